"""Command-line entries of training: arguments here, work in the modules they name."""

import argparse
from pathlib import Path

from vlm.arguments import add_columns, completed, natural, positive
from vlm.errors import UserError


def train(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  vlm train configs/finetune.yaml model.pretrained=models/llava data_root=mydata --out runs/mine\n"
        "  vlm train configs/finetune.yaml stages.chat.steps=500 stages.chat.learning_rates.lora=1e-4 --out runs/b\n"
        "  vlm train runs/mine/recipe.yaml --out runs/mine --resume\n"
        "  vlm train runs/mine/recipe.yaml --out runs/mine --resume stages.chat.steps=1000    (a longer run)"
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
    from data.benchmarks import BENCHMARKS

    parser.epilog = (
        "examples:\n"
        "  vlm eval runs/demo/model --task exact --data runs/demo/scenes/heldout.jsonl --controls --out runs/eval\n"
        "  vlm eval llava-hf/llava-1.5-7b-hf --task vqav2 --data vqa --split val2014 --limit 5000 --out runs/vqa\n"
        "  vlm eval demo --engine http://127.0.0.1:8000 --task pope --data coco_pope_random.json --out runs/pope\n"
        "  vlm eval MODEL --task vqav2 --data vqa --shard 1/4 --out part1     (and 2/4 ... elsewhere, then)\n"
        "  vlm eval merge part1 part2 part3 part4 --out runs/vqa\n\n"
        "Stopped or killed, the same command goes on. Several GPUs: accelerate launch $(which vlm) eval"
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="+", help="a model folder or hub id, or the name at a URL; or: merge FOLDER ..."
    )
    completed(parser.add_argument("--task", help=", ".join(BENCHMARKS)), BENCHMARKS)
    parser.add_argument("--data", type=Path, help="the benchmark's files as published: a folder, or the questions file")
    parser.add_argument("--images", type=Path, help="folder of the images (default: found beside the data)")
    parser.add_argument("--split", metavar="NAME", help="where the folder has several, as in the files' names")
    add_columns(parser, " (exact)")
    parser.add_argument("--out", type=Path, required=True, help="evaluation folder; one that is there is gone on with")
    parser.add_argument("--engine", default="torch", metavar="ENGINE", help="torch, vllm or an URL (default: torch)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--control", choices=("none", "blind", "shuffled"), default="none", help="withhold or exchange images"
    )
    parser.add_argument("--controls", action="store_true", help="both controls, too, side by side in the report")
    parser.add_argument("--mode", choices=("official", "normalised"), default="official", help="of the score")
    parser.add_argument("--shots", type=natural, default=0, metavar="N", help="demonstrations before each question")
    parser.add_argument("--shots-data", type=Path, metavar="PATH", help="where they are drawn from: the train split")
    parser.add_argument("--shots-images", type=Path, metavar="DIR", help="folder of their images")
    parser.add_argument("--shots-split", metavar="NAME", help="where that folder has several")
    parser.add_argument("--rank", action="store_true", help="take the likeliest of a question's choices (torch)")
    parser.add_argument("--prompt", metavar="TEXT", help="with {question} in it (default: what LLaVA-1.5 was asked)")
    parser.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of demonstrations and the shuffled control"
    )
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="only part I of N")
    parser.add_argument("--allow-partial", action="store_true", help="pictures may be missing; their questions fail")
    parser.add_argument("--retry-failed", action="store_true", help="ask questions that failed again")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu ... (default: the best there is; torch)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="questions at once (torch)")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="of an answer (default: as the task asks for)")
    parser.add_argument("--concurrency", type=positive, default=32, metavar="N", help="requests at once (vllm, URL)")
    parser.add_argument("--api-key", metavar="KEY", help="of a URL (default: $VLM_API_KEY or $OPENAI_API_KEY)")
    parser.add_argument("--vllm-python", metavar="PATH", help="the interpreter that has vLLM (default: this one)")
    parser.add_argument("--vllm-args", metavar="TEXT", default="", help="flags for vLLM's server, in one argument")
    defaults = vars(parser.parse_args(["MODEL", "--out", "DIR"]))
    parser.set_defaults(run=_evaluate, usage_error=parser.error, defaults=defaults)


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not slash or not part.isdecimal() or not parts.isdecimal() or not 1 <= int(part) <= int(parts):
        raise argparse.ArgumentTypeError(f"I/N is needed with I from 1 to N, such as 2/4, got {text}")
    return int(part), int(parts)


def _words(text: str) -> tuple[str, ...]:
    import shlex

    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"--vllm-args {text}: {error}") from None


def _evaluate(options: argparse.Namespace) -> int:
    from train.evaluation.journal import UNIMPORTANT
    from train.evaluation.run import merge
    from train.evaluation.tasks import Means, Question
    from train.evaluation.tell import run_evaluation, tell

    if options.model[0] == "merge" and len(options.model) > 1:
        told = {name: getattr(options, name) for name in options.defaults if name not in ("model", "out", "debug")}
        given = {name: value for name, value in told.items() if value != options.defaults[name]}
        if flags := ", ".join(f"--{name.replace('_', '-')}" for name in given if name not in UNIMPORTANT):
            options.usage_error(f"merge takes folders, --out and where files are; the parts know their own {flags}")
        return tell(merge([Path(name) for name in options.model[1:]], options.out, **given), options.out)
    if len(options.model) > 1 or options.task is None or options.data is None:
        options.usage_error("one MODEL, --task and --data are needed; or merge, and the folders of shards")
    question = Question(
        model=options.model[0],
        task=options.task,
        data=options.data,
        images=options.images,
        split=options.split,
        columns=tuple(options.columns),
        engine=options.engine,
        limit=options.limit,
        control=options.control,
        seed=options.seed,
        prompt=options.prompt,
        max_tokens=options.max_tokens,
        mode=options.mode,
        shots=options.shots,
        shots_data=options.shots_data,
        shots_images=options.shots_images,
        shots_split=options.shots_split,
        rank=options.rank,
        batch_size=options.batch_size,
        precision=options.precision,
        device=options.device,
        vllm_args=_words(options.vllm_args),
    )
    means = Means(
        allow_partial=options.allow_partial,
        retry_failed=options.retry_failed,
        shard=options.shard[0],
        shards=options.shard[1],
        concurrency=options.concurrency,
        api_key=options.api_key,
        vllm_python=options.vllm_python,
    )
    return run_evaluation(question, means, options.out, options.controls)


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
