"Package the library. All metadata is in settings.ini; this file only hands it to setuptools."

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
name = cfg["lib_name"]
statuses = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]


def absolute(link):
    "A link of README, for a page that has no files beside it."
    return f"{link[1]}]({cfg['git_url']}/{'raw' if link[1].startswith('!') else 'blob'}/{cfg['branch']}/{link[2]}"


readme = re.sub(
    r"(!?\[[^]]*)\]\((?![a-z]+:|#)([^)]+)", absolute, Path(__file__).with_name("README.md").read_text(encoding="utf-8")
)

setup(
    name=name,
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    keywords=cfg["keywords"].split(),
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: " + statuses[int(cfg["status"]) - 1],
        "Intended Audience :: " + cfg["audience"],
        "Natural Language :: " + cfg["language"],
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{k}" for k in range(int(cfg["min_python"].split(".")[1]), 14)),
    ],
    packages=find_packages(include=[name, f"{name}.*"]),
    package_data={name: ["weights/**", "pictures/*", "static/*", "py.typed", "*.pyi", "*/*.pyi"]},
    include_package_data=False,
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={
        key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")
    },
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{name}={name}._modidx:d"]},
    zip_safe=False,
)
