"""Command-line entries of training: arguments here, work in the modules they name."""

import argparse
from pathlib import Path


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
