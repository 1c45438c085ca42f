"""The one thing pyproject.toml cannot say: found packages and a mapped one together."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["raee_serve", "raee_serve.*"]), "raee_serve_patches"])
