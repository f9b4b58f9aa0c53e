"""Download the files of a base from the Hub, at one commit, to the cache of the Hub's client.

Each file is named, and the base is then loaded from the folder. transformers itself would also look
for other files, and would send the saved token with some of these requests, whatever `token` is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, is_offline_mode

from meteora.base.sources import INDEX, SHARD, TEXTS, SourceError
from meteora.untrusted.findings import brief
from meteora.untrusted.strict_json import StrictJSONError, parse_object

NO_TOKEN = {"token": False}
"""Without this, transformers sends the saved token to every repository."""
MAX_INDEX_BYTES = 32 << 20


def download_base(
    repo_id: str, revision: str, download: Mapping[str, Any] | None, *, weights: bool = True
) -> Path:
    """Return the folder with the files of a base; files in the cache are not downloaded again.

    Args:
        revision: a commit
        download: options of transformers about downloads, such as `token` or `cache_dir`
        weights: else only config and tokenizer

    Raises:
        SourceError: a file is missing, or cannot be downloaded.
    """
    options: dict[str, Any] = {**NO_TOKEN, **(download or {}), "revision": revision}
    try:
        config = cached_file(repo_id, "config.json", **options)
        if_present = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": not (
                is_offline_mode() or options.get("local_files_only", False)
            ),
        }
        for name in TEXTS:
            cached_file(repo_id, name, **options, **if_present)
        if weights:
            index = cached_file(repo_id, INDEX, **options, **if_present)
            for name in _shards(Path(index)) if index else ["model.safetensors"]:
                cached_file(repo_id, name, **options)
    except OSError as error:
        raise SourceError(
            f"{repo_id} at {revision[:12]}, the base of the checkpoint, does not come from the Hub:"
            f" {brief(error)}; give its folder as the base folder if you have it"
        ) from error
    return Path(str(config)).parent


def _shards(index: Path) -> list[str]:
    """The weight files that an index names; refuses names that no shard has."""
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise StrictJSONError(f"it has more than {MAX_INDEX_BYTES} bytes")
        names = {*parse_object(index.read_bytes()).get("weight_map", {}).values()}
    except (StrictJSONError, AttributeError, TypeError) as error:
        raise SourceError(f"{index}: it is no index of safetensors ({error})") from None
    if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
        raise SourceError(f"{index}: it names other files than shards of safetensors")
    return sorted(names)
