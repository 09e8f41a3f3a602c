"""Command-line entries of data: arguments here, work in the modules they name."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.arguments import add_columns, completed, natural, positive, share

if TYPE_CHECKING:
    from data.check_model import ModelSpec
    from data.key_map import KeyMap

WIDE = 1000  # columns where no terminal has fewer: a file's line isn't broken


def data(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  vlm data check rows.jsonl --images photos --model runs/demo/model --report check.html\n"
        "  vlm data show rows.jsonl 17 --model runs/demo/model\n"
        "  vlm data convert rows.json --out shards --to webdataset\n"
        "  vlm data scenes --out runs/scenes --train 2000\n"
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_check(actions.add_parser("check", help="look for what is wrong with rows and images, before a run"))
    _add_show(actions.add_parser("show", help="print a row as a model sees it"))
    scenes = actions.add_parser(
        "scenes", help="draw the synthetic scenes of the demo: PNG and JSONL, like anybody's data"
    )
    scenes.add_argument("--out", type=Path, required=True)
    scenes.add_argument("--train", type=int, default=20000, help="training scenes (default 20000)")
    scenes.add_argument("--heldout", type=int, default=1000, help="held-out questions (default 1000)")
    scenes.add_argument("--lessons", type=int, default=4500, help="scenes of lessons.jsonl (default 4500)")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.set_defaults(run=_scenes)
    _add_convert(actions.add_parser("convert", help="write any source as messages JSONL or as WebDataset shards"))


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a file, a folder, a-{000..012}.tar, or hub:owner/name")
    parser.add_argument("--out", type=Path, required=True, help="FILE.jsonl, or a folder for --to webdataset")
    parser.add_argument("--to", choices=("messages", "webdataset"), default="messages")
    parser.add_argument("--format", help="what SOURCE is, where it isn't found rightly (an unknown one lists all)")
    parser.add_argument("--images", type=Path, help="the folder that SOURCE's image paths are relative to")
    add_columns(parser)
    parser.add_argument("--shard-size", type=positive, default=1000, help="samples of a shard (default 1000)")
    parser.add_argument("--workers", type=natural, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--max-bad", type=share, default=0.0, help="broken rows to accept: 0.005 or 0.5%% (default 0)")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    from data.convert import convert
    from data.rows import image_folder
    from data.sources import open_source
    from vlm.errors import UserError
    from vlm.threads import usable_cores

    source = open_source(options.source, options.images, options.format, False, _columns(options))
    print(f"{options.source}: {len(source)} rows of {source.format}")
    size = options.shard_size if options.to == "webdataset" else None
    workers = usable_cores() if options.workers is None else options.workers
    done = convert(source, options.out, options.to, size, workers)
    print(f"{options.out}: {done.good} rows")
    if options.to == "messages" and not source.holds_images and image_folder(options.out) != source.images:
        print(f"its images are in {source.images}: read it with --images {source.images}")
    if done.bad:
        told = f"{done.bad} of {done.good + done.bad} rows are broken; they are in {done.quarantine}"
        if done.bad > options.max_bad * (done.good + done.bad):
            raise UserError(told)
        print(told)
    return 0


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--max-bad", type=share, default=0.0, metavar="SHARE", help="0.01 or 1%%; above it: exit 1")
    parser.add_argument("--decode-all", action="store_true", help="decode all images, not only some")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="FILE", help="data to be kept apart from this, for evaluation, say"
    )
    parser.add_argument("--against-images", type=Path, metavar="DIR", help="its images (default: as for a SOURCE)")
    parser.add_argument(
        "--context", type=positive, metavar="N", help="tokens that a row may have (default: the model's)"
    )
    parser.add_argument("--workers", type=natural, metavar="N", help="processes (default: as the work asks for)")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page, too")
    parser.add_argument(
        "--json", action="store_true", help="print all figures and broken rows as JSON, and nothing else"
    )
    parser.set_defaults(run=_check)


def _add_show(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("number", type=natural, metavar="N", help="which row, from 0 on")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the pictures there, as the model sees them")
    parser.add_argument("--draw", action="store_true", help="draw pictures even where the output is no terminal")
    parser.set_defaults(run=_show)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a file or folder of rows, or a data set of the hub")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder that image paths are relative to")
    parser.add_argument("--format", help="what the rows are, where that isn't found rightly")
    add_columns(parser)
    parser.add_argument("--model", help="a model, or a language model that is to become one")
    parser.add_argument(
        "--image-tokens",
        type=positive,
        default=576,
        metavar="N",
        help="of an image, for a language model (default 576)",
    )


def _columns(options: argparse.Namespace) -> "KeyMap":
    from data.key_map import read_key_map

    return read_key_map(options.columns, "--columns")


def _check(options: argparse.Namespace) -> int:
    import json
    import sys

    from data.check import check_source
    from data.sources import open_source

    source = open_source(options.source, options.images, options.format, False, _columns(options))
    against = [open_source(path, options.against_images) for path in options.against]
    findings = check_source(source, _spec(options, options.context), options.decode_all, against, options.workers)
    if options.report is not None:
        from data.check_page import write_page

        write_page(findings, options.report)
    if options.json:
        from data.check_figures import as_json

        json.dump(as_json(findings), sys.stdout)
        print()
    else:
        from rich.console import Console

        from data.check_report import print_report

        print_report(findings, Console(highlight=False, width=None if sys.stdout.isatty() else WIDE))
        if options.report is not None:
            print(f"written: {options.report}")
    if source.cut:
        print(f"{source.path}: a run doesn't start with it; `vlm data convert` saves the rows before", file=sys.stderr)
    return int(findings.bad_share > options.max_bad or bool(source.cut))


def _show(options: argparse.Namespace) -> int:
    from data.show import show_row
    from data.sources import open_source

    source = open_source(options.source, options.images, options.format, False, _columns(options))
    show_row(source, options.number, _spec(options), options.save, options.draw)
    return 0


def _spec(options: argparse.Namespace, context: int | None = None) -> "ModelSpec | None":
    if options.model is None:
        return None
    from data.check_model import ModelSpec

    return ModelSpec(options.model, context, options.image_tokens)


def _scenes(options: argparse.Namespace) -> int:
    from data.scenes.write import write_scenes

    write_scenes(options.out, train=options.train, heldout=options.heldout, lessons=options.lessons, seed=options.seed)
    print(f"done: {options.out}")
    return 0


def score(parser: argparse.ArgumentParser) -> None:
    from data.benchmarks import BENCHMARKS

    parser.epilog = (
        "examples:\n"
        "  vlm score vqav2 predictions.json v2_mscoco_val2014_annotations.json\n"
        "  vlm score vqav2 a.json v2_mscoco_val2014_annotations.json --against b.json\n"
        "  vlm score coco-caption captions.json captions_val2014.json --json --per-item\n"
        "  vlm score exact predictions.jsonl questions.jsonl --mode normalised"
    )
    completed(parser.add_argument("task", metavar="TASK", help=", ".join(BENCHMARKS)), BENCHMARKS)
    parser.add_argument("predictions", type=Path, help="answers, in the benchmark's own submission format")
    parser.add_argument("references", type=Path, help="the official file with the right answers")
    parser.add_argument(
        "--mode",
        choices=("official", "normalised"),
        default="official",
        help="official is what the official script does; normalised always cleans answers (default: official)",
    )
    parser.add_argument(
        "--tokenizer",
        choices=("ptb", "ptb-python", "none"),
        help="of captions: Stanford's where there is Java (ptb), our own rendition of it, or none (default: ptb)",
    )
    parser.add_argument("--clip", metavar="MODEL", help="a CLIP, for captions: CLIPScore and RefCLIPScore, too")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="the pictures, for --clip (default: the references')"
    )
    add_columns(parser, " (exact)")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="other predictions: differences, what changed")
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="score what fits, where questions have no prediction, or predictions no question; counts are told",
    )
    parser.add_argument("--bootstrap", type=natural, default=1000, metavar="N", help="draws for intervals; 0: none")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the draws")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON, and nothing else")
    parser.add_argument("--per-item", action="store_true", help="with --json: the score of every question, too")
    parser.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> int:
    from data.scoring import run_scoring

    return run_scoring(options)
