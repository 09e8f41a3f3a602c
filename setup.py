"""What pyproject.toml can't say: all packages found, and the folder configs/ installed as vlm_configs."""

from setuptools import find_packages, setup

FLOORS = ("vlm", "train", "serve", "data")

setup(
    packages=[*find_packages(include=[p for floor in FLOORS for p in (floor, f"{floor}.*")]), "vlm_configs"],
    package_dir={"vlm_configs": "configs"},
)
