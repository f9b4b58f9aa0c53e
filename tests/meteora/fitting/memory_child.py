"""Fit gates in a process of its own, and print its peak of memory and a hash of the gates.

python -m tests.meteora.fitting.memory_child CHECKPOINT BASE [by-layer]
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import meteora
from meteora.base.loading import layers_on_disk
from meteora.fitting.calibrate import calibrate
from meteora.fitting.sequences import LabelledSequence
from meteora.routing.gates import gates_of


def peak_bytes() -> int:
    """The most memory that this process had, with the parts of files that it mapped."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def main() -> None:
    checkpoint, base, *how = sys.argv[1:]
    device_map = layers_on_disk(Path(base), "cpu") if how else None
    before = peak_bytes()
    model, _ = meteora.load(checkpoint, base_folder=base, device_map=device_map)
    texts = [
        LabelledSequence(tuple(3 + 5 * e + (number + i) % 5 for i in range(9)), (e,) * 9)
        for e in range(2)
        for number in range(8)
    ]
    calibrate(model, texts)
    digest = hashlib.sha256()
    for pair in gates_of(model).own.values():
        for tensor in pair:
            digest.update(tensor.numpy())
    sys.stdout.write(json.dumps({"bytes": peak_bytes() - before, "gates": digest.hexdigest()}))


if __name__ == "__main__":
    main()
