"""Training: one module per trainer. `stage` runs any of them, from a recipe to a finished checkpoint."""

from pivot_hub.config.stages import Stage, register_stages

_CONVERSATIONS = ("shapes", "llava")
_PREFERENCES = ("shapes", "mmpr", "rlaif_v", "vlfeedback", "preference")
_VERIFIABLE = (*_PREFERENCES, "llava", "vqa", "boxes")
_SFT = "pivot_hub.training.sft"
_GRPO = "pivot_hub.training.grpo"

register_stages(
    [
        Stage(
            "vision",
            module="pivot_hub.training.vision",
            config="transformers:TrainingArguments",
            formats=("shapes",),
            content="captions",
            base_part=True,
        ),
        Stage(
            "language",
            module="pivot_hub.training.language",
            config="trl:SFTConfig",
            formats=("shapes",),
            base_part=True,
        ),
        Stage("align", _SFT, "trl:SFTConfig", _CONVERSATIONS, content="captions", takes_labels=True),
        Stage("instruct", _SFT, "trl:SFTConfig", _CONVERSATIONS, needs_parent=True, takes_labels=True),
        Stage("sft", _SFT, "trl:SFTConfig", _PREFERENCES, content="pairs", needs_parent=True, takes_labels=True),
        Stage(
            "dpo",
            module="pivot_hub.training.dpo",
            config="pivot_hub.training.dpo:PivotDPOConfig",
            formats=_PREFERENCES,
            content="pairs",
            needs_parent=True,
        ),
        *(
            Stage(
                name,
                module=_GRPO,
                config=f"{_GRPO}:Pivot{name.upper()}Config",
                formats=_VERIFIABLE,
                content="questions",
                needs_parent=True,
                takes_rewards=True,
            )
            for name in ("grpo", "rloo")
        ),
    ]
)
