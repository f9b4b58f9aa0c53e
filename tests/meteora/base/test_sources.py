import pytest

from meteora.base.sources import SourceError, find_gguf, names_path


def test_a_file_that_a_package_lists_and_lacks_is_not_there(tmp_path, monkeypatch):
    """An installation was interrupted, or somebody removed a large file by hand."""
    facts = tmp_path / "small_base-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: small-base\nVersion: 1\n")
    (facts / "RECORD").write_text("small_base/base.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SourceError, match=r"no GGUF file; name another package, or install the"):
        find_gguf("gguf:small-base/base.gguf")
    file = tmp_path / "small_base" / "base.gguf"
    file.parent.mkdir()
    file.touch()
    assert find_gguf("gguf:small-base/base.gguf") == file


def test_a_mistyped_folder_is_a_path_and_no_repository(tmp_path, monkeypatch):
    (tmp_path / "adapters").mkdir()
    monkeypatch.chdir(tmp_path)
    assert all(map(names_path, ("adapters", "adapters/sum", "path:org/sum", "../x/sum", "/x/sum")))
    assert not any(map(names_path, ("org/sum", "org/sum@v1", "adapters/sum@v1")))
