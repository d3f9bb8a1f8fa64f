"""MegaScale-MoE: training of Mixture-of-Experts models with communication hidden, compressed, or avoided.

Reading order: engine/op.py (the one idea), model/transformer.py (what is computed), strategies/attention_sp.py
and strategies/experts_all_to_all.py (where communication goes), engine/executor.py (how it runs), train/trainer.py (a
step).
"""

from megascale_moe.config import Config, ConfigError, ModelConfig
from megascale_moe.strategies.moe_block import MoEBlock

__version__ = "0.1.0"
__all__ = ["Config", "ConfigError", "MoEBlock", "ModelConfig"]
