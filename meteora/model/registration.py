"""Make `AutoModelForCausalLM`, `AutoTokenizer` and `pipeline` know fused checkpoints.

If the auto classes are loaded already, they learn them at once, else right after they load. So
`import meteora` does not load transformers, and the order of imports does not matter.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO = "transformers.models.auto"
LISTS = {
    f"{AUTO}.configuration_auto": "AutoConfig",
    f"{AUTO}.modeling_auto": "AutoModelForCausalLM",
    f"{AUTO}.tokenization_auto": "AutoTokenizer",
}
"""The modules of transformers with a list of classes, and the class that adds to each."""


def install() -> None:
    """Register now, or as soon as transformers is loaded; a second call changes nothing."""
    waiting = False
    for name in LISTS:
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _register(module)
        else:
            waiting = True
    if waiting and not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register(module: ModuleType) -> None:
    from meteora.model import auto_classes  # noqa: PLC0415  (it needs transformers, which is loaded by now)

    name = LISTS[module.__name__]
    getattr(module, name).register(*auto_classes.CLASSES[name], exist_ok=True)


class _Waiting(MetaPathFinder):
    """Finds the modules of `LISTS` as Python does, and registers once they are loaded."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in LISTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register(module)

        spec.loader.exec_module = load_and_register
        return spec
