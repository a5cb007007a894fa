"""Makes I-LoRA known to PEFT. Importing this module is enough, and doing so twice does no harm.

`PeftType` is a closed enumeration and `register_peft_method` refuses names outside it (PEFT 0.21), so the
member is added here. Nothing else of PEFT is touched.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import register_peft_method

from crab_edge.errors import DependencyError
from crab_edge.ilora.torch_tuner import ILoRAConfig, ILoRAModel

NAME = "ILORA"


def _add_member() -> None:
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    # The enumeration's own __setattr__ guards its members; this is not a re-assignment.
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member


def register() -> None:
    """Add `PeftType.ILORA` and its configuration and tuner classes, once."""
    if NAME not in PeftType.__members__:
        _add_member()
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(NAME))
    if known is None and PeftType(NAME) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name="ilora", config_cls=ILoRAConfig, model_cls=ILoRAModel, prefix=ILoRAModel.prefix
        )
    elif known is not ILoRAModel:
        raise DependencyError(
            f"peft already has a method called {NAME} ({known}); expected ours: install the peft of this "
            "release (pip install 'crab-edge[train]')"
        )


register()
