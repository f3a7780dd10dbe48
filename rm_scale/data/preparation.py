"""From a `RunConfig` to encoded training and evaluation sets, cached, with a report on every row.

Each source is read, checked and encoded by one parallel `map` whose result goes to a cache folder: written aside and
renamed when complete, so that a killed process never leaves half of one behind. Splitting and limits come after and
are cheap, so that trying another seed or size reads nothing twice.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rm_scale.config import RunConfig
from rm_scale.data.checks import (
    NUM_FIRST_ROWS,
    DataReport,
    IntArray,
    RejectionCount,
    SourceReport,
    TextStatistics,
    log_summary,
    text_statistics,
    too_many_text,
)
from rm_scale.data.encoding import EncodedGroup, TextEncoder
from rm_scale.data.formats import FormatVerdict, RowReader, choose_format
from rm_scale.data.groups import PreferenceGroup, RejectedRow
from rm_scale.data.sources import RawRows, Source, hub_source, local_sources
from rm_scale.errors import DataError, ModelError
from rm_scale.logs import get_logger

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = get_logger(__name__)

# Raise it when a change here, in formats or in encoding gives other results from the same file.
CODE_VERSION = 1
DEFAULT_CACHE_DIR = "~/.cache/rm_scale"
_BATCH_ROWS = 256
_CACHE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
# Columns kept in the cache for splitting and statistics, but not handed on.
_FACT_COLUMNS = ("lengths", "prompt_key", "group_key")


@dataclass(frozen=True)
class GroupSizes:
    """Sizes of all groups of a set, as arrays `(num_groups,)`.

    Attributes:
        num_tokens: of all K sequences, the prompt counted in each.
        prompt_length: leading tokens that the K sequences share.
        num_responses: K.
    """

    num_tokens: IntArray
    prompt_length: IntArray
    num_responses: IntArray


@dataclass(frozen=True)
class Origins:
    """Where the groups of a set come from, as arrays `(num_groups,)` in their order.

    Attributes:
        names: of the sources.
        source: place in `names`.
        prompt: hash of the prompt (and tools); groups of one prompt have the same.
        content: hash of prompt and responses. Both depend on the text alone, not on the tokenizer.
    """

    names: tuple[str, ...]
    source: IntArray
    prompt: IntArray
    content: IntArray


@dataclass(frozen=True)
class EvaluationData:
    """Encoded groups to evaluate on.

    Attributes:
        groups: columns as in `PreparedData`.
        origins: where each is from.
        sources: what became of the rows, per source.
        rejected: {"source", "row", "reason", "detail"} per refused row.
    """

    groups: Dataset
    origins: Origins
    sources: tuple[SourceReport, ...]
    rejected: RejectedRows


@dataclass(frozen=True)
class PreparedData:
    """Encoded data, the report on it, and the rows that were refused.

    Attributes:
        train, eval: columns `input_ids` (K lists of token ids), `prompt_length`, `ranks` (K), `margin`, `soft_label`
            (both null when not given), `subset`, `id`, `row` (index in its source), `num_tokens` (of all K sequences).
            Memory-mapped and in the order of the sources. `eval` is `None` when nothing was asked for.
        report: counts and statistics.
        rejected: {"source", "row", "reason", "detail"} per refused row; read from the cache when iterated over.
        train_sizes: sizes of the training groups, in their order.
        eval_origins: where the evaluation groups are from; `None` without them.
    """

    train: Dataset
    eval: Dataset | None
    report: DataReport
    rejected: RejectedRows
    train_sizes: GroupSizes
    eval_origins: Origins | None = None


class RejectedRows:
    """The refused rows of several sources, read from disk anew each time they are iterated over."""

    def __init__(self, parts: Sequence[tuple[Path, str, int]]) -> None:
        self._parts = list(parts)

    def __len__(self) -> int:
        return sum(count for _, _, count in self._parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path, source, _ in self._parts:
            with path.open(encoding="utf-8") as stream:
                for line in stream:
                    yield {"source": source, **json.loads(line)}


@dataclass(frozen=True)
class _Encoded:
    """One source from the cache: its usable rows, with the fact columns, and where the refused ones are listed."""

    used: Dataset
    report: SourceReport
    rejected_path: Path


def prepare_data(config: RunConfig, encoder: TextEncoder) -> PreparedData:
    """Read, check, encode and split the data of a run; a second call finds everything in the cache.

    The share of refused rows is not judged here: write the report first (`write_data_report`), then call
    `raise_if_too_many(prepared.report, config.max_rejected_share)`.

    Raises:
        DataError: a source can't be read or fits no format, nothing usable is left, or the split is impossible.
        ModelError: conversations without a chat template.
    """
    train_sources, eval_sources = _sources(config)
    train_parts = [_encoded(source, "train", config, encoder) for source in train_sources]
    eval_parts = [_encoded(source, "eval", config, encoder) for source in eval_sources]
    train = _joined(train_parts)
    evaluation = _joined(eval_parts) if eval_parts else None
    held_out = 0
    if config.eval_split_size is not None:
        train, evaluation = _split(train, config.eval_split_size, _seed(config))
        held_out = len(evaluation)
    usable = len(train) + (len(evaluation) if evaluation else 0)
    train = train.limit(config.max_train_samples)
    evaluation = evaluation.limit(config.max_eval_samples) if evaluation else None
    parts = train_parts + eval_parts
    report = DataReport(
        sources=tuple(part.report for part in parts),
        train=train.statistics(),
        eval=evaluation.statistics() if evaluation else None,
        held_out=held_out,
        left_out_by_limit=usable - len(train) - (len(evaluation) if evaluation else 0),
        shared_prompts=len(np.intersect1d(train.prompts, evaluation.prompts)) if evaluation else 0,
    )
    log_summary(report)
    rejected = RejectedRows([(part.rejected_path, part.report.name, part.report.rows_rejected) for part in parts])
    evaluation_set = evaluation.dataset if evaluation else None
    eval_origins = evaluation.origins() if evaluation else None
    return PreparedData(train.dataset, evaluation_set, report, rejected, train.group_sizes(), eval_origins)


def prepare_evaluation(config: RunConfig, encoder: TextEncoder, only: IntArray | None = None) -> EvaluationData:
    """Read, check and encode data to evaluate on, cached as in `prepare_data`.

    Args:
        config: what is read is its evaluation data, or without any all of its training data.
        encoder: how text becomes tokens.
        only: `Origins.content` of the groups wanted; default the first `max_eval_samples`.

    Raises:
        DataError: a file can't be read or fits no format, or nothing usable is left.
        ModelError: conversations without a chat template.
    """
    if config.eval_dataset_path:
        sources = local_sources(config.eval_dataset_path, config.dataset_test_split or "test")
    else:
        train, evaluation = _sources(config)
        sources = evaluation or train
    parts = [_encoded(source, "eval", config, encoder) for source in sources]
    side = _joined(parts)
    side = side.limit(config.max_eval_samples) if only is None else side.take(_places(side.groups, only))
    rejected = RejectedRows([(part.rejected_path, part.report.name, part.report.rows_rejected) for part in parts])
    return EvaluationData(side.dataset, side.origins(), tuple(part.report for part in parts), rejected)


def _places(contents: IntArray, wanted: IntArray) -> IntArray:
    return np.flatnonzero(np.isin(contents, wanted))


def prepare_held_out(config: RunConfig, encoder: TextEncoder) -> EvaluationData:
    """The evaluation groups of a run, as its training had them.

    Raises:
        DataError: the run had none; otherwise as `prepare_data`.
    """
    if config.eval_dataset_path:
        return prepare_evaluation(config, encoder)  # nothing of it depends on the training data
    data = prepare_data(config, encoder)
    if data.eval is None or data.eval_origins is None:
        raise DataError("the run has no evaluation data of its own. Fix: --dataset_path FILE.")
    splits = {report.split for report in data.report.sources}
    used = tuple(report for report in data.report.sources if report.split == "eval" or "eval" not in splits)
    return EvaluationData(data.eval, data.eval_origins, used, data.rejected)


def _sources(config: RunConfig) -> tuple[list[Source], list[Source]]:
    evaluation: list[Source] = []
    if config.dataset_name:
        train = [hub_source(config.dataset_name, config.dataset_config, config.dataset_train_split)]
        if config.dataset_test_split:
            evaluation = [hub_source(config.dataset_name, config.dataset_config, config.dataset_test_split)]
    else:
        train = local_sources(config.dataset_path or [], config.dataset_train_split)
    if config.eval_dataset_path:
        evaluation = local_sources(config.eval_dataset_path, config.dataset_test_split or "test")
    if not train:
        raise DataError("dataset_path and dataset_name: neither is given. Fix: --dataset_path FILE.")
    return train, evaluation


def _seed(config: RunConfig) -> int:
    return config.seed if config.data_seed is None else config.data_seed


# --- The cache -----------------------------------------------------------------------------------------------------


def cache_key(source: Source, config: RunConfig, encoder: TextEncoder) -> str:
    """Hash of everything that decides the encoded rows of a source."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "datasets")}
    facts = {
        "code": CODE_VERSION,
        "versions": versions,
        "source": source.identity,
        "format": config.dataset_format,
        "subset_column": config.subset_column,
        "encoder": encoder.describe(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _encoded(source: Source, split: str, config: RunConfig, encoder: TextEncoder) -> _Encoded:
    root = Path(config.dataset_cache_dir or DEFAULT_CACHE_DIR).expanduser()
    key = cache_key(source, config, encoder)
    folder = root / f"encoded-{key}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not _is_complete(folder):
            with _lock(root / f"encoded-{key}.lock", source.name):
                _build_if_missing(folder, source, config, encoder)
    except OSError as error:
        if error.errno not in _CACHE_ERRORS:
            raise
        raise DataError(
            f"dataset_cache_dir={root}: can't be written ({error}). Fix: --dataset_cache_dir DIR, one with room."
        ) from error
    return _load(folder, source.name, split)


def _lock(path: Path, name: str) -> Any:
    """A lock that the system frees when its holder dies; says so when another process is at work."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    while True:
        try:
            return lock.acquire(timeout=60)
        except Timeout:
            logger.info(f"{name}: waiting for another process that is encoding it (lock {path})")


def _is_complete(folder: Path) -> bool:
    return (folder / "meta.json").is_file()


def _build_if_missing(folder: Path, source: Source, config: RunConfig, encoder: TextEncoder) -> None:
    if _is_complete(folder):
        return
    # Whoever holds the lock may clear away what killed processes left.
    shutil.rmtree(folder, ignore_errors=True)
    for left in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    aside = folder.parent / f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}"
    aside.mkdir()
    try:
        _build(aside, source, config, encoder)
        try:
            aside.rename(folder)
        except OSError:
            # Some network file systems don't lock across nodes; then another node may have been first.
            if not _is_complete(folder):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _build(folder: Path, source: Source, config: RunConfig, encoder: TextEncoder) -> None:
    """Encode one source into `folder`: `used/`, `rejected.jsonl` and, last, `meta.json`."""
    work = folder / "work"
    work.mkdir()
    raw = source.load(work)
    try:
        sample = raw.sample()
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from error
    verdict = choose_format(config.dataset_format, raw.columns(sample), sample, source.name, config.subset_column)
    reader = RowReader(verdict.name, config.subset_column, source.name)
    _warn_about_template(sample, reader, encoder)
    mapped = _map(raw, reader, encoder, config, work)
    reasons = np.asarray(mapped.with_format("arrow").select_columns(["reason"])[:]["reason"].to_numpy())
    good = np.flatnonzero(reasons == "")
    used = mapped.select(good).remove_columns(["reason", "detail"])
    if len(used):
        used.save_to_disk(str(folder / "used"))
    rejected = _write_rejected(mapped.select(np.flatnonzero(reasons != "")), folder / "rejected.jsonl")
    _write_meta(folder, verdict, len(mapped), len(used), rejected)
    del mapped, used, raw
    shutil.rmtree(work)


def _warn_about_template(sample: Sequence[Any], reader: RowReader, encoder: TextEncoder) -> None:
    """Say early what would make scores differ between places, looking at the first usable row."""
    groups = (_read(reader, row, index) for index, row in enumerate(sample))
    group = next((group for group in groups if isinstance(group, PreferenceGroup)), None)
    if group is None:
        return
    if group.is_conversational and "strftime_now" in (encoder.chat_template or ""):
        logger.warning(
            "The chat template writes today's date, so the same text will get another score on another day. "
            "Fix: --chat_template_path with a fixed date."
        )
    try:
        encoder.encode(group.prompt, group.responses[0], group.tools)  # without a chat template the run ends here
    except DataError:
        return  # this row will be counted under its reason
    try:
        encoder.render(group.prompt, group.responses[0], group.tools)
    except ModelError as error:
        logger.warning(str(error))


def _write_rejected(rows: Dataset, path: Path) -> dict[str, RejectionCount]:
    counts: dict[str, int] = {}
    first: dict[str, list[int]] = {}
    with path.open("w", encoding="utf-8") as stream:
        for row in rows.select_columns(["row", "reason", "detail"]):
            reason = row["reason"]
            counts[reason] = counts.get(reason, 0) + 1
            if counts[reason] <= NUM_FIRST_ROWS:
                first.setdefault(reason, []).append(row["row"])
            stream.write(json.dumps({"row": row["row"], "reason": reason, "detail": row["detail"]}) + "\n")
    return {reason: RejectionCount(count, tuple(first[reason])) for reason, count in sorted(counts.items())}


def _write_meta(
    folder: Path, verdict: FormatVerdict, rows_read: int, rows_used: int, rejected: Mapping[str, RejectionCount]
) -> None:
    meta = {
        "format": verdict.name,
        "format_reason": verdict.why,
        "ignored_columns": list(verdict.ignored_columns),
        "rows_read": rows_read,
        "rows_used": rows_used,
        "rejected": {reason: [entry.count, list(entry.first_rows)] for reason, entry in rejected.items()},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _load(folder: Path, name: str, split: str) -> _Encoded:
    import datasets

    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["rows_used"]:
        used = datasets.load_from_disk(str(folder / "used"))
    else:
        features = datasets.Features({k: v for k, v in _features().items() if k not in ("reason", "detail")})
        used = datasets.Dataset.from_dict({column: [] for column in features}, features=features)
    ignored = f"; columns not read: {', '.join(meta['ignored_columns'])}" if meta["ignored_columns"] else ""
    logger.info(f"{name}: read as {meta['format']}, since {meta['format_reason']}{ignored}")
    rejected = {reason: RejectionCount(count, tuple(rows)) for reason, (count, rows) in meta["rejected"].items()}
    report = SourceReport(
        name=name,
        split=split,
        format=meta["format"],
        format_reason=meta["format_reason"],
        rows_read=meta["rows_read"],
        rows_used=meta["rows_used"],
        rejected=rejected,
        ignored_columns=tuple(meta["ignored_columns"]),
    )
    assert report.rows_read == report.rows_used + report.rows_rejected, report
    return _Encoded(used, report, folder / "rejected.jsonl")


# --- Reading and encoding rows -------------------------------------------------------------------------------------


def _features() -> Features:
    from datasets import Features, List, Value

    return Features(
        {
            "input_ids": List(List(Value("int32"))),
            "prompt_length": Value("int32"),
            "ranks": List(Value("int32")),
            "margin": Value("float32"),
            "soft_label": Value("float32"),
            "subset": Value("string"),
            "id": Value("string"),
            "row": Value("int64"),
            "num_tokens": Value("int32"),
            "lengths": List(Value("int32")),
            "prompt_key": Value("int64"),
            "group_key": Value("int64"),
            "reason": Value("string"),
            "detail": Value("string"),
        }
    )


def _map(raw: RawRows, reader: RowReader, encoder: TextEncoder, config: RunConfig, work: Path) -> Dataset:
    """All rows of a source with the encoded columns, and `reason` ("" = used) and `detail` beside them."""
    num_proc = min(config.dataset_num_proc or 1, len(raw.dataset))
    return raw.dataset.map(
        _row_encoder(raw, reader, encoder),
        with_indices=True,
        batched=True,
        batch_size=_BATCH_ROWS,
        remove_columns=raw.dataset.column_names,
        features=_features(),
        num_proc=num_proc if num_proc > 1 else None,
        cache_file_name=str(work / "mapped.arrow"),
        load_from_cache_file=False,
        # Given, so that `datasets` does not hash the tokenizer: our own key covers it.
        new_fingerprint=hashlib.sha256(str(work).encode()).hexdigest()[:16],
        desc=f"Encoding {reader.source}",
    )


def _row_encoder(
    raw: RawRows, reader: RowReader, encoder: TextEncoder
) -> Callable[[Mapping[str, Sequence[Any]], Sequence[int]], dict[str, list[Any]]]:
    names = list(_features())
    decode = RawRows(None, raw.is_json).decode  # without the data set, which must not travel to the workers again

    def encode_batch(batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        rows = decode(batch, indices)
        read = [_read(reader, row, index) for index, row in rows]
        groups = [group for group in read if isinstance(group, PreferenceGroup)]
        encoded = iter(encoder.encode_groups(groups))
        records = []
        for (index, _), group in zip(rows, read, strict=True):
            if isinstance(group, RejectedRow):
                records.append(_rejected_record(index, group))
                continue
            result = next(encoded)
            if isinstance(result, RejectedRow):
                records.append(_rejected_record(index, result))
            else:
                records.append(_used_record(index, group, result))
        return {name: [record[name] for record in records] for name in names}

    return encode_batch


def _read(reader: RowReader, row: Any, index: int) -> PreferenceGroup | RejectedRow:
    if isinstance(row, RejectedRow):
        return row
    try:
        return reader.read(row, index)
    except RejectedRow as rejected:
        return rejected
    except RecursionError:
        return RejectedRow("wrong_type", "the row's values are nested too deeply")


def _used_record(index: int, group: PreferenceGroup, encoded: EncodedGroup) -> dict[str, Any]:
    group_key = _hash([group.prompt, list(group.responses), group.tools])
    return {
        "input_ids": list(encoded.input_ids),
        "prompt_length": encoded.prompt_length,
        "ranks": list(encoded.ranks),
        "margin": encoded.margin,
        "soft_label": encoded.soft_label,
        "subset": encoded.subset,
        "id": encoded.id,
        "row": index,
        "num_tokens": encoded.num_tokens,
        "lengths": [len(ids) for ids in encoded.input_ids],
        # Groups without a prompt have nothing in common.
        "prompt_key": _hash([group.prompt, group.tools]) if group.prompt else group_key,
        "group_key": group_key,
        "reason": "",
        "detail": "",
    }


def _rejected_record(index: int, rejected: RejectedRow) -> dict[str, Any]:
    # The detail may quote the row, whose text may be what can't be written as UTF-8.
    detail = rejected.detail.encode("utf-8", errors="backslashreplace").decode()[:500]
    empty: dict[str, Any] = {
        "input_ids": [],
        "ranks": [],
        "lengths": [],
        "margin": None,
        "soft_label": None,
        "subset": "",
        "id": "",
    }
    numbers = dict.fromkeys(("prompt_length", "num_tokens", "prompt_key", "group_key"), 0)
    return {**empty, **numbers, "row": index, "reason": rejected.reason, "detail": detail}


def _hash(value: Any) -> int:
    digest = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


# --- Joining, splitting, limits ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """Training or evaluation data: a data set, and per group what splitting and statistics need, as arrays.

    The arrays are read once, column by column and before any selection: reading columns through a selection costs
    seconds per hundred thousand rows.
    """

    dataset: Dataset
    prompt_lengths: IntArray
    lengths: IntArray
    ranks: IntArray
    sizes: IntArray
    prompts: IntArray
    groups: IntArray
    sources: IntArray
    source_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, indices: IntArray) -> _Side:
        """Only these groups, in this order."""
        sizes = self.sizes[indices]
        starts = (np.cumsum(self.sizes) - self.sizes)[indices]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        flat = np.repeat(starts, sizes) + within
        return _Side(
            self.dataset.select(indices),
            self.prompt_lengths[indices],
            self.lengths[flat],
            self.ranks[flat],
            sizes,
            self.prompts[indices],
            self.groups[indices],
            self.sources[indices],
            self.source_names,
        )

    def limit(self, count: int | None) -> _Side:
        """The first groups only."""
        return self if count is None or count >= len(self) else self.take(np.arange(count))

    def group_sizes(self) -> GroupSizes:
        """Sizes of the groups, for packing."""
        totals = np.add.reduceat(self.lengths, np.cumsum(self.sizes) - self.sizes)
        return GroupSizes(totals, self.prompt_lengths, self.sizes)

    def origins(self) -> Origins:
        """Where the groups are from."""
        return Origins(self.source_names, self.sources, self.prompts, self.groups)

    def statistics(self) -> TextStatistics:
        return text_statistics(self.prompt_lengths, self.lengths, self.ranks, self.sizes, self.prompts, self.groups)


def _joined(parts: Sequence[_Encoded]) -> _Side:
    import datasets

    used = [part.used for part in parts if len(part.used)]
    if not used:
        reports = [part.report for part in parts]
        read, lost = sum(r.rows_read for r in reports), sum(r.rows_rejected for r in reports)
        raise DataError("no usable row is left. " + too_many_text(reports, read, lost, 0.0))
    data = datasets.concatenate_datasets(used) if len(used) > 1 else used[0]
    columns = data.select_columns([*_FACT_COLUMNS, "prompt_length", "ranks"]).with_format("arrow")[:]
    ranks = columns["ranks"].combine_chunks()
    return _Side(
        data.remove_columns(list(_FACT_COLUMNS)),
        prompt_lengths=_integers(columns["prompt_length"].combine_chunks()),
        lengths=_integers(columns["lengths"].combine_chunks().flatten()),
        ranks=_integers(ranks.flatten()),
        sizes=_integers(ranks.value_lengths()),
        prompts=_integers(columns["prompt_key"].combine_chunks()),
        groups=_integers(columns["group_key"].combine_chunks()),
        sources=np.repeat(np.arange(len(parts)), [len(part.used) for part in parts]),
        source_names=tuple(part.report.name for part in parts),
    )


def _integers(array: Any) -> IntArray:
    return np.asarray(array.to_numpy(zero_copy_only=False)).astype(np.int64)


def _split(side: _Side, size: float, seed: int) -> tuple[_Side, _Side]:
    """Hold out groups for evaluation; groups of one prompt stay on one side.

    Prompts are drawn in an order that depends on the seed and the prompts alone, not on processes or files' order.
    """
    wanted = int(size) if size >= 1 else round(size * len(side))
    if not 1 <= wanted < len(side):
        raise DataError(
            f"eval_split_size={size:g}: holds out {wanted} of {len(side)} usable groups; at least one must be on each "
            "side. Fix: choose another size, or give eval_dataset_path."
        )
    _, prompt_of, sizes = np.unique(side.prompts, return_inverse=True, return_counts=True)
    held = _draw(sizes, wanted, seed)[prompt_of.reshape(-1)]
    if not held.any():
        raise DataError(
            f"eval_split_size={size:g}: every prompt has more than {wanted} groups, and groups of one prompt stay "
            "together. Fix: choose a larger size, or give eval_dataset_path."
        )
    if held.sum() != wanted:
        logger.warning(f"eval_split_size={size:g}: {held.sum()} groups held out, as groups of one prompt stay together")
    return side.take(np.flatnonzero(~held)), side.take(np.flatnonzero(held))


def _draw(sizes: IntArray, wanted: int, seed: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which prompts to take, in random order, each if its groups still fit in."""
    taken = np.zeros(len(sizes), dtype=bool)
    left = wanted
    for prompt in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[prompt] <= left:
            taken[prompt] = True
            left -= int(sizes[prompt])
        if not left:
            break
    return taken
