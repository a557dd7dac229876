"""The commands and examples of a document, run one after the other as a newcomer would."""

import os
import re
import subprocess
import sys
from pathlib import Path

from script_runner import ROOT, script_environment

TIMEOUT = 600  # seconds for a block


def marked_blocks(text):
    """(language, code) of each block that follows a line <!-- run -->; "sh" or "python"."""
    return re.findall(r"<!-- run -->\n```(\w+)\n(.*?)```", text, flags=re.DOTALL)


def run_blocks(text, folder, languages, checks=""):
    """Run the marked blocks of a text in a folder, beside the scripts.

    :param languages: of the blocks there must be, in order.
    :param checks: Python code that is run after each example in Python, in its place.
    :return: the processes, which have ended well.
    """
    for name in ("scripts", "datasets"):
        (folder / name).symlink_to(ROOT / name)
    env = script_environment({"PYTHONPATH": os.fspath(ROOT)})
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    blocks = marked_blocks(text)
    assert [language for language, _ in blocks] == list(languages)
    ended = []
    for language, code in blocks:
        command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-c"]
        command += [] if language == "sh" else [code + checks]
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        ended.append(done)
    return ended


def missing_links(text, folder):
    """The files that a text links to, and that are not there."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+)", prose)
    return [t for t in targets if "://" not in t and not (folder / t).exists()]
