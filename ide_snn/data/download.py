"""Fetches published files: checked against their published checksums, from mirrors in turn, resumed where cut off."""

from __future__ import annotations

import http.client
import logging
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ide_snn.files import DataError

__all__ = ["Remote"]

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds without an answer
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Remote:
    """Where files are published.

    Args:
        title: of the data set, for messages.
        md5: the files' names and their checksums.
        mirrors: addresses that a name is appended to, tried in this order.
    """

    title: str
    md5: Mapping[str, str]
    mirrors: tuple[str, ...]

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        """Download the files `names` into `folder`; files that are there already are not touched.

        Raises:
            DataError: no mirror gave the file that was published; says which files to put where.
            ImportError: pooch is not installed; says that too.
        """
        if not names:
            return
        by_hand = f"to do without, put {', '.join(names)} into {folder}"
        try:
            import pooch
        except ImportError as error:
            raise ImportError(
                f"downloading {self.title} needs pooch: pip install -e '.[download]'; {by_hand}"
            ) from error
        for name in names:
            if not (folder / name).exists():
                self._fetch_one(pooch, name, folder, by_hand)

    def _fetch_one(self, pooch: Any, name: str, folder: Path, by_hand: str) -> None:
        reasons = []
        for mirror in self.mirrors:
            try:
                pooch.retrieve(
                    mirror + name, f"md5:{self.md5[name]}", fname=name, path=folder, downloader=_Resuming(folder, name)
                )
            except (OSError, ValueError, http.client.HTTPException) as error:
                logger.warning("%s: %s%s failed: %s", self.title, mirror, name, error)
                reasons.append(f"{mirror} ({' '.join(str(error).split())})")
            else:
                return
        raise DataError(f"{self.title}: {name} could not be downloaded from {' or '.join(reasons)}; {by_hand}")


@dataclass(frozen=True)
class _Resuming:
    """pooch's hook for the transfer itself; what came before a cut stays in <folder>/.<name>.part."""

    folder: Path
    name: str

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        part = self.folder / f".{self.name}.part"
        present = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={present}-"} if present else {})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                self._receive(response, part, present)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            # nothing is left to send: the part is the whole, or wrong, which the checksum will tell
        shutil.move(part, output_file)

    def _receive(self, response: http.client.HTTPResponse, part: Path, present: int) -> None:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            present = 0  # this server starts from the beginning whatever it is asked for
        length = response.headers.get("Content-Length")
        total = None if length is None else present + int(length)
        with (
            part.open("ab" if present else "wb") as file,
            tqdm(desc=self.name, total=total, initial=present, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
        size = part.stat().st_size
        if total is not None and size < total:
            raise OSError(f"the connection ended after {size} of {total} bytes; the next attempt goes on from there")
