# SPDX-License-Identifier: MIT
"""The decoder, once: block, model, causal language model, loss, generation. Architectures are
configs (see CONTRIBUTING).

    h <- h + mixer(norm(h));  h <- h + mlp(norm(h))

Padding and boundaries are resolved once per forward: the real tokens are packed into one row, every
layer receives the same `SequenceLayout`, and the result is unpacked at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
import torch.nn as nn
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from fla._arguments import check_width, checked
from fla.core.layout import SequenceLayout
from fla.core.operator import transformed
from fla.core.parallel import refuse_sharded
from fla.layers.mixer import Mixer
from fla.models.config import DecoderConfig
from fla.models.packing import resolve_layout
from fla.models.utils import Cache
from fla.modules import FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss, GatedMLP, RMSNorm
from fla.modules.feature_map import HedgehogFeatureMap
from fla.modules.l2warp import L2_FACTOR, l2_warp
from fla.modules.linear import is_plain
from fla.modules.moe import ExpertMLPs, MixtureOfExperts
from fla.ops.engine.sharding import mean_over_ranks, sharded_next_tokens

IGNORE = -100


def build_mixer(config: DecoderConfig, layer_idx: int) -> Mixer:
    """The mixer that `layer_types` names for a layer: the architecture's own, or attention."""
    if config.layer_type(layer_idx) == "linear_attention":
        if config.mixer is None:
            raise ValueError(
                f"{type(config).__name__} has no linear attention; layer_types[{layer_idx}] "
                "must be attention"
            )
        return config.mixer.from_config(config, layer_idx)
    attention, values = config.attention_at(layer_idx)
    return attention(config.hidden_size, **values, layer_idx=layer_idx)


class DecoderBlock(GradientCheckpointingLayer):
    """A layer of a decoder: forward(hidden, layout, *values of `takes`, past_key_values=None)
    returns (hidden, *values of `gives`). Values travel as tensors of their own by position, which
    is where checkpointing with `use_reentrant=True` looks for what needs a gradient.
    """

    mixer_name: ClassVar[str] = "attn"

    @property
    def takes(self) -> tuple[str, ...]:
        """What the mixer reads of other layers."""
        return getattr(self, self.mixer_name).takes

    @property
    def gives(self) -> tuple[str, ...]:
        """What the mixer computes for other layers."""
        return getattr(self, self.mixer_name).gives

    def mixed(
        self, x: Tensor, layout: SequenceLayout, handed: tuple[Any, ...], cache: Cache | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The mixer's output for x, and what it gives."""
        taken = dict(zip(self.takes, handed, strict=True))
        mixer = getattr(self, self.mixer_name)
        o, _, _, *given = mixer(x, layout=layout, past_key_values=cache, **taken)
        return o, given


class Block(DecoderBlock):
    """`h + attn(attn_norm(h))`, then `h + mlp(mlp_norm(h))`, or `h + attn_norm(attn(h))` and
    `h + mlp_norm(mlp(h))`, by `norm_after`; `layer_types` names the mixer, `moe` the MLP.
    """

    def __init__(self, config: DecoderConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = build_mixer(config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        experts = config.experts(layer_idx)
        self.sparse = experts is not None
        self.mlp: nn.Module
        if experts is not None:
            self.mlp = MixtureOfExperts(config.hidden_size, experts)
        else:
            self.mlp = GatedMLP(
                config.hidden_size,
                config.hidden_ratio,
                config.intermediate_size,
                config.hidden_act,
                config.fuse_swiglu,
            )
        self.norm_after = config.layer_type(layer_idx) in (config.norm_after or ())

    @property
    def gives(self) -> tuple[str, ...]:
        return (*super().gives, "balance_loss") if self.sparse else super().gives

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        *handed: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor | None, ...]:
        read = hidden if self.norm_after else self.attn_norm(hidden)
        mixed, given = self.mixed(read, layout, handed, past_key_values)
        if self.norm_after:
            residual = hidden = hidden + self.attn_norm(mixed)
        else:
            hidden, residual = self.mlp_norm(mixed, residual=hidden, prenorm=True)
        if self.sparse:
            y, loss = self.mlp(hidden, with_loss=True)
            given = [*given, loss]
        else:
            y = self.mlp(hidden)
        return residual + (self.mlp_norm(y) if self.norm_after else y), *given


class DecoderPreTrainedModel(PreTrainedModel):
    """What models of every architecture tell transformers about themselves."""

    config_class = DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True  # a recurrent state cannot be cropped, which assisted decoding would need
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = {"correction_bias"}  # noqa: RUF012

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: the saved module names the package, whose sources are not to be copied."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mixer | HedgehogFeatureMap):
            for name, value in module.initial_values().items():
                init.copy_(module.get_parameter(name), value)
        elif isinstance(module, ExpertMLPs):
            for weight in module.parameters():
                init.normal_(weight, std=self.config.initializer_range)
        elif isinstance(module, MixtureOfExperts) and hasattr(module, "correction_bias"):
            init.zeros_(module.correction_bias)

    def _check_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        """Raise unless exactly one of both is given, and fits the model."""
        name = type(self).__name__
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{name}: give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            self._check_ids("input_ids", input_ids)
        else:
            check_width(name, "inputs_embeds", inputs_embeds, self.config.hidden_size, 3)

    def _check_ids(self, what: str, ids: Tensor, ignored: int | None = None) -> None:
        """Raise unless `ids` are integers `[B, T]` below the vocabulary's size, or `ignored`. On a
        device, which would have to be waited for, values are not looked at.
        """
        name, size = type(self).__name__, self.config.vocab_size
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: {what} has dtype {ids.dtype}; expected int64 or int32")
        if ids.dim() != 2:
            raise ValueError(f"{name}: {what} has shape {list(ids.shape)}; expected [B, T]")
        if not ids.is_cpu or torch.compiler.is_compiling() or transformed():
            return
        wrong = (ids < 0) | (ids >= size)
        if ignored is not None:
            wrong &= ids != ignored
        if bool(wrong.any()):
            also = "" if ignored is None else f", or {ignored} for none"
            raise ValueError(
                f"{name}: {what} holds {int(ids[wrong][0])}; expected 0 to {size - 1}{also}"
            )

    def resolve_layout(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        **packing: Any,
    ) -> SequenceLayout:
        """The layout of `tokens` `[B, T, ...]`, continuing what the cache has seen."""
        past = 0 if cache is None else cache.get_seq_length()
        layout = resolve_layout(
            type(self).__name__,
            *tokens.shape[:2],
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            position_ids=position_ids,
            past_length=past,
            device=tokens.device,
            **packing,
        )
        whole = attention_mask is not None and attention_mask.shape[1] == past + tokens.shape[1]
        if cache is not None and past and cache.padded and not whole:
            raise ValueError(
                "the cache holds padding, so every further call needs the whole attention_mask "
                f"[B, {past} + T]; pass it with ones for the new tokens"
            )
        return layout


class DecoderModel(DecoderPreTrainedModel):
    """Token ids to hidden states.

    An architecture may bring its own `block`, name its last norm otherwise (`norm_name`, as
    published checkpoints do), and hand values to its layers (`handed`).
    """

    block: ClassVar[type[nn.Module]] = Block
    norm_name: ClassVar[str] = "norm"

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        if self.block is not Block and (config.moe is not None or config.norm_after):
            name = "norm_after" if config.moe is None else "moe"
            raise ValueError(
                f"{type(config).__name__}: {name} is not part of a {self.block.__name__}; drop it"
            )
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(self.block(config, i) for i in range(config.num_hidden_layers))
        self.add_module(self.norm_name, self.last_norm(config))
        self.gradient_checkpointing = False
        self.post_init()

    @staticmethod
    def last_norm(config: DecoderConfig) -> nn.Module:
        """The norm after the last layer."""
        return RMSNorm(config.hidden_size, eps=config.norm_eps)

    def handed(self) -> dict[str, list[Tensor]]:
        """What the model itself gives its layers, by name: a value for each of them."""
        return {}

    def auxiliary_loss(self, given: dict[str, list[Tensor]]) -> Tensor | None:
        """What joins the loss in training, from what the layers gave: the mean of the experts'
        load-balancing losses.
        """
        losses = [loss for loss in given.get("balance_loss", []) if loss is not None]
        return torch.stack(losses).mean() if losses else None

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = cast(nn.Embedding, value)

    @checked
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        layout: SequenceLayout | None = None,
        **packing: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids `[B, T]` (or inputs_embeds `[B, T, D]`); attention_mask `[B, past + T]`,
        padding on any side.

        Packed sequences come with cu_seqlens (B = 1), with position_ids that start again at 0
        inside a row, or with what transformers' collators write: `fla.models.packing`. Hidden
        states at padding are zero.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions is not supported: linear attention forms no attention matrix"
            )
        self._check_cache(past_key_values)
        self._check_tokens(input_ids, inputs_embeds)
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if layout is None:
            layout = self.resolve_layout(
                hidden, attention_mask, cu_seqlens, position_ids, past_key_values, **packing
            )
        use_cache = self._wants_cache(use_cache, past_key_values, layout)
        cache = past_key_values
        if cache is None and use_cache:
            cache = Cache(config=self.config)
        dtype, hidden = hidden.dtype, layout.pack(hidden)
        collected, given = [hidden], self.handed()
        for i, block in enumerate(cast("Iterable[DecoderBlock]", self.layers)):
            taken = [_latest(given.get(name), i) for name in block.takes]
            hidden, *values = block(hidden, layout, *taken, past_key_values=cache)
            for name, value in zip(block.gives, values, strict=True):
                given.setdefault(name, []).append(value)
            if output_hidden_states:
                collected.append(hidden)
        hidden = layout.unpack(self.get_submodule(self.norm_name)(hidden).to(dtype))
        if cache is not None:
            cache.advance(layout.length, layout.padded)
        states = None
        if output_hidden_states:
            states = (*(layout.unpack(x) for x in collected[:-1]), hidden)
        output: Any = BaseModelOutputWithPast(hidden, cache if use_cache else None, states)
        output.auxiliary_loss = self.auxiliary_loss(given) if self.training else None
        return output if return_dict or return_dict is None else output.to_tuple()

    def _wants_cache(
        self, use_cache: bool | None, cache: Cache | None, layout: SequenceLayout
    ) -> bool:
        """Whether a cache is returned, or `ValueError` where one cannot be kept."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and layout.rows
        if not use_cache and cache is None:
            return False
        if not layout.rows:
            raise ValueError(
                "packed sequences have no cache; pass use_cache=False, or a padded batch with "
                "attention_mask"
            )
        if self.gradient_checkpointing and self.training:
            raise ValueError(
                f"{type(self).__name__}: gradient checkpointing computes every layer twice, so a "
                "cache would see its tokens twice; pass use_cache=False and no past_key_values, or "
                "call gradient_checkpointing_disable()"
            )
        return use_cache

    @staticmethod
    def _check_cache(cache: Cache | None) -> None:
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; pass "
                "fla.models.utils.Cache(config=model.config), which also keeps recurrent states "
                "and counts tokens"
            )


def _latest(values: list[Tensor] | None, layer: int) -> Tensor | None:
    """The layer's own value of a list with one for each, else the last one there is."""
    return values[min(layer, len(values) - 1)] if values else None


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """A decoder with a language-model head."""

    model_class: type[DecoderModel] = DecoderModel
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.add_module(self.base_model_prefix, self.model_class(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.get_decoder().embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.get_decoder().set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def get_decoder(self) -> DecoderModel:
        return self.get_submodule(self.base_model_prefix)  # type: ignore[return-value]

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; this model "
                "keeps its own "
                "cache: leave it unset"
            )
        if generation_config.use_cache is not False:
            if model_kwargs.get("past_key_values") is None:
                model_kwargs["past_key_values"] = Cache(config=self.config)
            else:
                model_kwargs["past_key_values"]._is_user_defined = True

    @checked
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **packing: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """`DecoderModel.forward`, and logits `[B, T, vocab_size]` of all tokens, of the last
        `logits_to_keep` tokens, or of the positions it lists. labels `[B, T]` are the tokens
        themselves (the shift happens here); -100, padding and the first token of every sequence
        carry no loss. With `fuse_linear_cross_entropy` and labels, logits is None in training.

        The loss is a mean over the tokens that carry one, 0 without any; or their sum over
        `num_items_in_batch`, which transformers' Trainer counts over the batches of one update.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        self.get_decoder()._check_cache(past_key_values)
        self._check_tokens(input_ids, inputs_embeds)
        assert tokens is not None  # one of them was given
        layout = self.resolve_layout(
            tokens, attention_mask, cu_seqlens, position_ids, past_key_values, **packing
        )
        output = self.get_decoder()(
            input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            layout=layout,
        )
        hidden, loss, logits = output.last_hidden_state, None, None
        if labels is not None:
            loss, logits, share = self._loss(hidden, labels, layout, num_items_in_batch)
            if output.auxiliary_loss is not None:
                refuse_sharded(type(self).__name__, "the experts' balance is over all tokens")
                loss = loss + output.auxiliary_loss * share
        if labels is None:
            keep = logits_to_keep
            logits = self.lm_head(hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep])
        result = CausalLMOutputWithPast(loss, logits, output.past_key_values, output.hidden_states)
        return result if return_dict or return_dict is None else result.to_tuple()

    def _loss(
        self, hidden: Tensor, labels: Tensor, layout: SequenceLayout, items: int | Tensor | None
    ) -> tuple[Tensor, Tensor | None, float | Tensor]:
        """(loss, logits where they were formed, these tokens' share of all `items`). Each token is
        scored on the next one of its own sequence.
        """
        if labels.shape != (layout.batch, layout.length):
            raise ValueError(
                f"labels has shape {list(labels.shape)}; expected [B={layout.batch}, "
                f"T={layout.length}]"
            )
        self._check_ids("labels", labels, IGNORE)
        if labels.device != hidden.device:
            raise ValueError(
                f"{type(self).__name__}: labels is on {labels.device} and the tokens on "
                f"{hidden.device}; move it there"
            )
        targets = next_tokens(labels, layout)
        loss, logits = self._mean_loss(hidden, targets)
        count: int | Tensor = (targets != IGNORE).sum()
        rows, share = 1.0, cast("float | Tensor", 1.0)
        if layout.shard is not None:
            if self.config.use_l2warp and logits is None:
                refuse_sharded(
                    type(self).__name__,
                    "use_l2warp needs the logits, which fuse_linear_cross_entropy does not form",
                )
            loss, count = mean_over_ranks(loss, int(count), hidden, layout.shard.parallel)
            rows = layout.length / max(1, layout.shard.total)
        if items is not None:
            share = count / (items.clamp_min(1) if isinstance(items, Tensor) else max(items, 1))
            loss = loss * share
        if self.config.use_l2warp and logits is not None:
            loss = l2_warp(loss, logits, float(L2_FACTOR * rows * share))
        return loss, logits, share

    def _mean_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        head = self.lm_head
        if self.config.fuse_linear_cross_entropy and self.training and is_plain(head):
            loss = FusedLinearCrossEntropyLoss(use_l2warp=self.config.use_l2warp)
            return loss(hidden, targets, head.weight, head.bias), None
        logits = self.lm_head(hidden)
        if self.config.fuse_cross_entropy:
            loss = FusedCrossEntropyLoss()(logits, targets)
        else:
            rows, chosen = logits.flatten(0, 1).float(), targets.flatten()
            total = nn.functional.cross_entropy(rows, chosen, ignore_index=IGNORE, reduction="sum")
            loss = total / (chosen != IGNORE).sum().clamp_min(1)
        return loss, logits


def next_tokens(labels: Tensor, layout: SequenceLayout) -> Tensor:
    """`[B, T]` targets: at each token the label of the next real token of its sequence, else -100.

    Example:
        >>> layout = SequenceLayout.resolve(1, 5, cu_seqlens=torch.tensor([0, 2, 5]))
        >>> next_tokens(torch.tensor([[1, 2, 3, 4, 5]]), layout).tolist()
        [[2, -100, 4, 5, -100]]
    """
    if layout.shard is not None:
        return sharded_next_tokens(labels, layout, IGNORE)
    if layout.cu_seqlens is None:
        return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    packed = layout.pack(labels.unsqueeze(-1)).squeeze(-1)
    targets = torch.nn.functional.pad(packed[:, 1:], (0, 1), value=IGNORE)
    ends = layout.cu_seqlens[1:].long() - 1
    targets = targets.index_fill(1, ends[ends >= 0].to(labels.device), IGNORE)
    if layout.indices is None:
        return targets
    unpacked = torch.full_like(labels, IGNORE).flatten()
    return unpacked.index_copy(0, layout.indices, targets.flatten()).view_as(labels)


def register(
    config: type[DecoderConfig], model: type[DecoderModel], causal_lm: type[DecoderForCausalLM]
) -> None:
    """Make an architecture known to transformers' Auto classes."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
