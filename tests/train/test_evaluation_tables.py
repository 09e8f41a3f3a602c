"""MMBench's table through `vlm eval`: asked, ranked, with controls, and its submission."""

import base64
import io
from pathlib import Path

from PIL import Image

from data.benchmarks import find_benchmark
from tests.train.evaluations import ask, scores


def test_the_table_of_mmbench_is_asked_ranked_and_submitted(model: Path, tmp_path: Path) -> None:
    rows = ["index\tquestion\tA\tB\tC\tanswer\tcategory\timage"]
    for n in range(3):
        picture = io.BytesIO()
        Image.new("RGB", (20, 20), (80 * n, 90, 90)).save(picture, "PNG")
        image = base64.b64encode(picture.getvalue()).decode() if n else "broken"
        rows.append(f"{n}\twhich?\tx\ty\t\tA\tocr\t{image}")
        rows.append(f"{1_000_000 + n}\twhich?\ty\tx\t\tB\tocr\t{n}")
    data = tmp_path / "mmbench_dev_20230712.tsv"
    data.write_text("\n".join(rows))
    for out, options in (("said", ()), ("ranked", ("--rank",))):
        assert ask(model, tmp_path, tmp_path / out, "--controls", *options, task="mmbench") == 0
        found = scores(tmp_path / out)
        assert (found["n"], found["failed"], found["questions"]) == (6, 2, 3)
        assert {row["id"] for row in found["failures"]} == {"0", "1000000"}
        assert set(found["metrics"]) == {"accuracy", "circular", "category/ocr"}
        assert set(found["controls"]) == {"blind", "shuffled"}
        told = find_benchmark("mmbench").score_files(tmp_path / out / "predictions.tsv", data)
        assert told.metrics == found["metrics"]
        assert told.per_item == found["per_item"]
    assert scores(tmp_path / "ranked")["unparsed"] == 0
    assert "<summary>By kind</summary>" in (tmp_path / "said" / "report.html").read_text()
