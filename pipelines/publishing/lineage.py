"""The lineage of a checkpoint: what lies in it, and what it was made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.publishing.in_toto import dependency, statement

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meteora.checkpoint.manifest import Manifest


def write_lineage(manifest: Manifest, files: Mapping[str, str], recipe_sha256: str) -> str:
    """An in-toto statement: what lies in the checkpoint, and what it was made of.

    Args:
        files: name to SHA-256 of the checkpoint's own files
    """
    base = manifest.base
    return statement(
        files,
        made_of=[
            dependency("base", base.repo_id, base.revision, licence=base.licence),
            *(
                dependency(
                    f"expert {expert.name}",
                    expert.source,
                    expert.revision,
                    sha256=expert.weights_sha256,
                    licence=expert.licence,
                )
                for expert in manifest.experts
            ),
        ],
        asked={"recipe_sha256": recipe_sha256},
        chosen={
            "fused_id": manifest.fused_id,
            "router_id": manifest.router_id,
            "gates": manifest.gates,
        },
    )
