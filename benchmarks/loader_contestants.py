"""Who loads small files in loaders.py: orchestra's faces and the peers, each set up as a user would.

Owns: what serves them, and the conversion of those that need one. Leaves to others: the loading loops
(loader_reader.py), turns and tables (loaders.py).
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestants import KEY, SECRET, Contestant, Native, OrchestraMount, OrchestraNode, clean_environment
from origin import BUCKET
from synthetic import expected_bytes

HERE = Path(__file__).resolve().parent
SIZE = 110_000
LOADER = {"batch_size": 32, "num_workers": 2}
SHARD_FILES = 50
# The slowest peer needs 40 s for an epoch; litdata was seen to hang now and then.
LOAD_TIMEOUT_S = 180


class LoaderFailedError(Exception):
    """A loader could not do its work; the message says who and why."""


class LoaderMixin:
    """Does a turn in a fresh process; `share` of the files for the slow ones, `cold_share` (None: the same) of them in
    cold turns. `module` is what must be installed."""

    name = ""
    share = 1.0
    cold_share: float | None = None
    is_cached = True  # a second epoch does not go to the store again
    needs_conversion = False
    module = ""

    def loader_setup(self) -> tuple[str, dict[str, Any]]:
        """Return the loader's kind and its arguments."""
        raise NotImplementedError

    def environment_of_reader(self) -> dict[str, str]:
        """Return the environment of the loading process."""
        return clean_environment() | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}

    def load(self, names: Sequence[str], *, check: bool = False, epochs: int = 1) -> dict[str, Any]:
        """Load each file once an epoch; end with a sentence unless all came and, when asked, hold what they should."""
        method, setup = self.loader_setup()
        request = {"method": method, "setup": setup, "names": list(names), "loader": LOADER, "check": check}
        request["epochs"] = epochs
        command = [sys.executable, str(HERE / "loader_reader.py")]
        output = run_group(command, json.dumps(request), self.environment_of_reader(), self.name)
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        if answer["files"] != len(names) * epochs:
            raise LoaderFailedError(f"{self.name} loaded {answer['files']} files instead of {len(names) * epochs}")
        if check and answer["byte_sum"] != sum(expected_bytes(one, 0, 1)[0] for one in names):
            raise LoaderFailedError(f"{self.name} loaded wrong bytes")
        return answer


class NativeLoader(LoaderMixin, Native):
    """The floor: the same files on the local disk, opened and read one by one."""

    name = "plain Dataset, native files"

    def loader_setup(self) -> tuple[str, dict[str, Any]]:
        return "folder", {"folder": str(self.root)}


class OrchestraLoader(LoaderMixin, OrchestraNode):
    """FileDataset over the namespace."""

    name = "orchestra.torch.FileDataset"

    def loader_setup(self) -> tuple[str, dict[str, Any]]:
        return "orchestra", {"folder": f"orchestra:///{BUCKET}", "config": str(self.config)}

    def list_folders(self, folders: Sequence[str]) -> None:
        for folder in folders:
            self.orchestra("ls", f"/{BUCKET}/{folder}")


class MountLoader(LoaderMixin, OrchestraMount):
    """A script that knows nothing of orchestra, on its mount."""

    name = "plain Dataset, orchestra mount"
    cold_share = 0.125  # one file after the other in each worker: 46 s for all of them

    def loader_setup(self) -> tuple[str, dict[str, Any]]:
        return "folder", {"folder": f"{self.mountpoint}/{BUCKET}"}


class MountFileDataset(MountLoader):
    """FileDataset over the mounted folder."""

    name = "FileDataset, orchestra mount"
    cold_share = 1.0

    def loader_setup(self) -> tuple[str, dict[str, Any]]:
        return "orchestra", {"folder": f"{self.mountpoint}/{BUCKET}"}


class S3fsLoader(LoaderMixin, Contestant):
    """DataLoader over s3fs."""

    name = "DataLoader on s3fs"
    share = 0.125
    is_cached = False
    module = "s3fs"

    def loader_setup(self) -> tuple[str, dict[str, Any]]:
        options = {"key": KEY, "secret": SECRET, "endpoint_url": self.origin_url}
        return "s3fs", {"prefix": f"{BUCKET}/", "options": options}


class ConnectorLoader(LoaderMixin, Contestant):
    """Amazon's connector for PyTorch."""

    name = "s3torchconnector"
    share = 0.125
    is_cached = False
    module = "s3torchconnector"

    def loader_setup(self) -> tuple[str, dict[str, Any]]:
        return "s3torchconnector", {"url": self.origin_url, "bucket": BUCKET}


class ConvertedLoader(LoaderMixin, Contestant):
    """A loader that reads shards of its own form; warm, they are files of this machine."""

    needs_conversion = True
    method = ""

    def loader_setup(self) -> tuple[str, dict[str, Any]]:
        return self.method, {"folder": str(self.folder / "shards")}

    def convert(self, names: Sequence[str]) -> None:
        """Write the files as shards."""
        raise NotImplementedError


class WebDatasetLoader(ConvertedLoader):
    """Tar files."""

    name = "webdataset (converted, local)"
    method = module = "webdataset"

    def convert(self, names: Sequence[str]) -> None:
        (self.folder / "shards").mkdir()
        for shard, start in enumerate(range(0, len(names), SHARD_FILES)):
            with tarfile.open(self.folder / "shards" / f"{shard:05d}.tar", "w") as tar:
                for number, name in enumerate(names[start : start + SHARD_FILES]):
                    info = tarfile.TarInfo(f"{shard:05d}-{number:05d}.bin")
                    info.size = SIZE
                    tar.addfile(info, io.BytesIO(expected_bytes(name, 0, SIZE)))


class MosaicLoader(ConvertedLoader):
    """MDS shards."""

    name = "mosaicml-streaming (converted, local)"
    method = "mosaic"
    module = "streaming"

    def convert(self, names: Sequence[str]) -> None:
        code = (
            "import json, sys; sys.path.insert(0, sys.argv[1]); from streaming import MDSWriter\n"
            "from synthetic import expected_bytes\n"
            "with MDSWriter(out=sys.argv[2], columns={'x': 'bytes'}) as writer:\n"
            "    for name in json.load(sys.stdin): writer.write({'x': expected_bytes(name, 0, int(sys.argv[3]))})\n"
        )
        _convert(code, self.folder / "shards", names)


class LitDataLoader(ConvertedLoader):
    """LitData's chunks."""

    name = "litdata (converted, local)"
    method = module = "litdata"

    def convert(self, names: Sequence[str]) -> None:
        script = self.folder / "convert.py"  # a file: litdata's processes import the function
        script.write_text(
            "import json, sys; sys.path.insert(0, sys.argv[1]); from litdata import optimize\n"
            "from synthetic import expected_bytes\n"
            "def sample(name): return expected_bytes(name, 0, int(sys.argv[3]))\n"
            "if __name__ == '__main__':\n"
            "    names = json.load(sys.stdin)\n"
            "    optimize(sample, names, sys.argv[2], chunk_bytes='32MB', num_workers=1, start_method='fork')\n"
        )
        _convert(script, self.folder / "shards", names)


def run_group(command: Sequence[str], text: str, environment: dict[str, str], name: str) -> str:
    """Run a command with its children as one group, so that a loader that hangs is ended with all its workers; return
    what it printed. Raises LoaderFailedError."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            output, complaints = process.communicate(text, timeout=LOAD_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise LoaderFailedError(f"{name} hangs: nothing for {LOAD_TIMEOUT_S} s") from error
    if process.returncode != 0:
        raise LoaderFailedError(f"{name} failed: {complaints.strip()[-2000:]}")
    return output


def _convert(program: str | Path, folder: Path, names: Sequence[str]) -> None:
    """Run a peer's own writer in a process of its own."""
    start = [str(program)] if isinstance(program, Path) else ["-c", program]
    ended = subprocess.run(
        [sys.executable, *start, str(HERE), str(folder), str(SIZE)],
        input=json.dumps(list(names)),
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=600,
    )
    if ended.returncode != 0:
        raise LoaderFailedError(f"the conversion failed: {ended.stderr.strip()[-2000:]}")


def installed(module: str) -> bool:
    """Whether a peer can be imported here."""
    return not module or importlib.util.find_spec(module) is not None


def write_files(root: Path, names: Sequence[str]) -> None:
    """Write the made-up files as plain ones."""
    for name in names:
        path = root / name
        os.makedirs(path.parent, exist_ok=True)
        path.write_bytes(expected_bytes(name, 0, SIZE))
