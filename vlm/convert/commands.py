"""Command-line entries of import and export: arguments here, work in the modules they name."""

import argparse
from pathlib import Path


def import_(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  vlm import llava-hf/llava-1.5-7b-hf --out models/llava\n"
        "  vlm import ./llava-v1.5-7b --vision-tower openai/clip-vit-large-patch14-336 --out models/llava"
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder or hub id: LLaVA or LLaVA-NeXT of transformers")
    parser.add_argument("--out", type=Path, required=True, help="model folder to be written")
    parser.add_argument("--base", metavar="LM", help="the language model of a checkpoint that holds none")
    parser.add_argument("--vision-tower", metavar="TOWER", help="the vision encoder of a checkpoint that holds none")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="a Jinja template in place of the source's")
    parser.set_defaults(run=_import)


def _import(options: argparse.Namespace) -> int:
    from vlm.convert.imported import add_self_test
    from vlm.convert.importing import import_model
    from vlm.convert.progress import shown

    with shown("importing") as progress:
        notes = import_model(
            options.source, options.out, progress, options.base, options.vision_tower, options.chat_template
        )
    notes += [note for note in (add_self_test(options.out),) if note]
    for note in notes:
        print(note)
    print(f"done: {options.out}")
    return 0


def export(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  vlm export models/llava --to llava-hf --out exported\n"
        "  vlm export runs/mine/model --to vlm --out mine"
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder, an adapter's folder, or a hub id")
    parser.add_argument(
        "--to", choices=("llava-hf", "vlm"), required=True, help="transformers' LLaVA, or our own layout"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to be written")
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from vlm.convert.exporting import export_model
    from vlm.convert.progress import shown

    with shown("exporting") as progress:
        difference = export_model(options.model, options.to, options.out, progress)
    print(
        f"largest difference of logits to the source: {difference.largest:.2g} (up to {difference.bound:.2g} is fine)"
    )
    print(f"done: {options.out}")
    return 0
