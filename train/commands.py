"""Command-line entries of training: arguments here, work in the modules they name."""

import argparse
from pathlib import Path

from vlm.arguments import natural, positive


def train(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  vlm train configs/finetune.yaml model.pretrained=runs/demo/model data_root=mydata --out runs/mine\n"
        "  vlm train configs/finetune.yaml stages.chat.steps=500 stages.chat.learning_rates.lora=1e-4 --out runs/b\n"
        "  vlm train runs/mine/recipe.yaml --out runs/mine --resume"
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/NAME-OF-THE-RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, bit for bit")
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from train.loop import run_training
    from train.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    run = run_training(recipe, options.out or Path("runs") / options.recipe.stem, options.resume)
    print(f"done: {run.model}")
    return 0


def evaluate(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  vlm eval runs/demo/model --task exact --data runs/demo/scenes/heldout.jsonl --out runs/eval\n"
        "  vlm eval runs/demo/model --task exact --data runs/demo/scenes/heldout.jsonl --control blind --out runs/blind"
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder or hub id")
    parser.add_argument("--task", required=True, help="vqav2 or exact")
    parser.add_argument("--data", type=Path, required=True, help="the benchmark's questions")
    parser.add_argument("--images", type=Path, help="folder of the images (default: images beside the data)")
    parser.add_argument("--out", type=Path, required=True, help="evaluation folder")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--control", choices=("none", "blind", "shuffled"), default="none", help="withhold or exchange images"
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the shuffled control")
    parser.add_argument("--engine", choices=("torch",), default="torch")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N")
    parser.add_argument("--max-tokens", type=positive, default=32, metavar="N")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from train.evaluate import evaluate

    result = evaluate(
        options.model,
        options.task,
        options.data,
        options.images,
        options.out,
        limit=options.limit,
        control=options.control,
        seed=options.seed,
        device=options.device,
        precision=options.precision,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
    )
    for name, value in result.scores.metrics.items():
        print(f"{name:32} {value:8.4f}")
    if unscored := len(result.items) - result.scores.n:
        print(f"{unscored} questions without references: answered, not scored")
    print(f"n = {result.scores.n}, images: {result.control}, {result.seconds:.1f} s; {options.out / 'report.html'}")
    return 0


def report(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example:\n  vlm report runs/mine"
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from train.pages import write_run_page
    from train.runs import Run
    from vlm.errors import UserError

    run = Run(options.folder)
    if not run.recipe_file.is_file():
        raise UserError(f"{options.folder}: not a run folder (no recipe.yaml in it)")
    write_run_page(run, run.folder / "report.html")
    print(run.folder / "report.html")
    return 0


def demo(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "examples:\n  vlm demo --out runs/demo\n  vlm demo --fusion deep --out runs/deep"
    parser.add_argument("--fusion", choices=("early", "deep"), default="early")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=natural, default=0, metavar="N")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything: shows that it runs, learns little"
    )
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from train.demo import run_demo

    return run_demo(options.out, options.fusion, options.seed, options.quick)
