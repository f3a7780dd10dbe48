"""Data sets of the Hugging Face hub, read at a commit that is known and recorded.

`datasets` may answer from its cache without a word, whatever revision was asked for: here what was found is compared
with what was asked, and every refusal says whether it is the name, the network, an offline switch or a licence.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.data.sources import RawRows, Source, require_rows
from rm_scale.data.stream_rows import hub_rows
from rm_scale.errors import DataError
from rm_scale.logs import get_logger
from rm_scale.texts import one_line

logger = get_logger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSplit:
    """One split of a hub data set, as it is asked for.

    Attributes:
        name: OWNER/NAME, or a local folder in the form of such a data set.
        config: its configuration, if it has several.
        split: its split.
        revision: branch, tag or commit; `None` for the newest.
        data_dir: folder in it that holds the files to read.
        where: the setting that names it, for messages.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_dir: str | None = None
    where: str = "dataset_name"

    @property
    def label(self) -> str:
        """Its name in reports."""
        at = f"@{self.revision}" if self.revision is not None else ""
        config = f"/{self.config}" if self.config is not None else ""
        return f"{self.name}{at}{config}[{self.split}]"

    def __str__(self) -> str:
        asked = {"config": self.config, "split": self.split, "revision": self.revision, "data_dir": self.data_dir}
        given = ", ".join(f"{name}={value}" for name, value in asked.items() if value is not None)
        return f"{self.where}={self.name} ({given})"


def hub_source(asked: HubSplit, streamed: bool = False) -> Source:
    """Return the source for one split of a hub data set, with the commit that it was read at.

    Args:
        asked: which one.
        streamed: download nothing; its rows are read over the network as they are needed, by `Source.stream`.

    Raises:
        DataError: no such data set, configuration, split or revision; it is gated; or the hub can't be reached.
    """
    import datasets
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    wrong = (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError, HfHubHTTPError, httpx.HTTPError)
    try:
        builder = datasets.load_dataset_builder(
            asked.name, asked.config, data_dir=asked.data_dir, revision=asked.revision
        )
        commit = builder.hash if not Path(asked.name).is_dir() else None
        _require_revision(asked, commit)
        if streamed:
            dataset = builder.as_streaming_dataset(split=asked.split)
        else:
            builder.download_and_prepare()
            dataset = builder.as_dataset(split=asked.split)
    except DataError:
        raise
    except wrong as error:
        raise DataError(hub_error_text(asked, error)) from error
    if commit is not None:
        logger.info(f"{asked.label}: commit {commit}")
    identity = {
        "hub": asked.name,
        "config": asked.config,
        "split": asked.split,
        "data_dir": asked.data_dir,
        "commit": commit,
    }
    if streamed:
        if commit is None:
            identity["folder"] = _files_below(Path(asked.name))
        return Source(
            asked.label,
            identity,
            _refuse_copy,
            commit=commit,
            stream=lambda start: hub_rows(dataset, asked.label, start),
        )
    identity["fingerprint"] = dataset._fingerprint
    return Source(
        asked.label,
        identity,
        lambda _: RawRows(require_rows(dataset, asked.label), is_json=False),
        commit=commit,
    )


def _refuse_copy(work: Path) -> RawRows:
    raise AssertionError(f"a streamed source is read by Source.stream, not copied to {work}")


def _files_below(folder: Path) -> list[list[Any]]:
    """Return name, size and time of each file of a folder that stands for a hub data set."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _require_revision(asked: HubSplit, commit: str | None) -> None:
    """Refuse a commit other than the one asked for: without a network `datasets` takes the newest of its cache.

    Raises:
        DataError: it is another one, or it can't be told.
    """
    if asked.revision is None or commit is None:
        return
    wanted = asked.revision if _COMMIT.fullmatch(asked.revision) else _cached_commit(asked)
    if wanted is not None and wanted != commit:
        raise DataError(
            f"{asked}: is at commit {wanted}, but the cache holds {commit}, and the hub can't be reached. Fix: fetch "
            f"it where there is a network (rm-scale data), or revision: {commit}."
        )
    if wanted is None and is_offline():
        raise DataError(
            f"{asked}: which commit this is can't be told without the hub; the cache holds {commit}. Fix: "
            f"revision: {commit}, if that is the one."
        )


def _cached_commit(asked: HubSplit) -> str | None:
    """Return the commit that a branch or tag had when the hub was last asked, from the hub's cache of files."""
    from huggingface_hub import constants

    folder = f"datasets--{asked.name.replace('/', '--')}"
    ref = Path(constants.HF_HUB_CACHE, folder, "refs", str(asked.revision))
    try:
        return ref.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def is_offline() -> bool:
    """Tell whether the hub's libraries were told to use what is cached alone."""
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)


def hub_error_text(asked: HubSplit, error: BaseException) -> str:
    """Return the message for a hub data set that can't be read: what is wrong, and what to do about it."""
    said = one_line(error, 600) or type(error).__name__
    text = f"{asked}: can't be loaded from the hub or its cache: {said.rstrip('.')}. Fix: "
    return text + _fix(asked, said, " ".join(_chain(error)))


def _fix(asked: HubSplit, said: str, chain: str) -> str:
    page = f"https://huggingface.co/datasets/{asked.name}"
    own = asked.where == "dataset_name"
    lower = said.lower()
    if "gated" in lower or "GatedRepoError" in chain:
        return (
            f"accept its terms on {page} with your account, then log in here: set HF_TOKEN in the environment, or "
            "run `hf auth login`."
        )
    if "revision" in lower and "exist" in lower:
        return f"a branch, tag or commit that {page}/tree/main lists."
    if "split" in lower:
        names = "--dataset_train_split or --dataset_test_split" if own else "split:"
        return f"{names} with one of the splits above."
    if "config" in lower:
        return f"{'--dataset_config' if own else 'config:'} with one of the configurations above."
    if is_offline():
        return (
            "HF_HUB_OFFLINE is set, so only what is cached is read: fetch it once where there is a network, with the "
            f"same HF_HOME ({os.environ.get('HF_HOME', '~/.cache/huggingface')}), or unset HF_HUB_OFFLINE."
        )
    if "OfflineModeIsEnabled" in chain or "Couldn't reach" in said or "Connect" in chain or "Timeout" in chain:
        return (
            "there is no connection to the hub. Try again with a network; on nodes without one fetch it beforehand "
            "with the same HF_HOME and set HF_HUB_OFFLINE=1; or give local files with --dataset_path."
        )
    return (
        f"check the name (OWNER/NAME) on {page}; a private one needs HF_TOKEN in the environment; or give local files "
        "with --dataset_path."
    )


def _chain(error: BaseException | None) -> list[str]:
    """Return the types of an error and of those that it came from."""
    names: list[str] = []
    while error is not None and len(names) < 20:
        names.append(type(error).__name__)
        error = error.__cause__ or error.__context__
    return names


def hub_record(sources: list[Source]) -> list[dict[str, Any]]:
    """Return name and commit of the hub data sets among sources, for a run's record."""
    return [{"name": source.name, "commit": source.commit} for source in sources if "hub" in source.identity]
