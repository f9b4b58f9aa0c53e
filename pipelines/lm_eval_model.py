"""The module that lm-eval's command imports for fused models; users' YAML files have its name."""

from lm_eval.__main__ import cli_evaluate

from pipelines.evaluation.lm_eval_model import Meteora

__all__ = ["Meteora"]

if __name__ == "__main__":
    cli_evaluate()
