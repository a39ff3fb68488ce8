# SPDX-License-Identifier: MIT
"""`fla train`: from the command's arguments to a trained, scored and saved model."""

from __future__ import annotations

import difflib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

import fla.models
from fla.core.errors import TrainingDiverged, UsageError
from fla.data.corpus import compressed_bits_per_byte, load_corpus
from fla.data.documents import Corpus
from fla.data.shards import make_blocks
from fla.data.tokens import TokenBlocks, collate, encode, load_tokenizer
from fla.evals.perplexity import Score, score, windows
from fla.models.config import DecoderConfig
from fla.training.arguments import check_folder, check_numbers, only_writer, refusals
from fla.training.callbacks import FlaTrainer, Interruption, LiveProgress, LossGuard, Seal, say
from fla.training.card import write_card
from fla.training.checkpoints import checkpoints, damage, newest_whole, seal
from fla.training.saved import load_saved
from fla.training.sharded import ShardedTrainer


@dataclass
class RunArguments:
    """The arguments that `fla train` adds to transformers' TrainingArguments."""

    model: str = field(
        default="gated_deltanet",
        metadata={"help": "Registered architecture, or a folder to continue from."},
    )
    model_config: list[str] = field(
        default_factory=list, metadata={"help": "Config overrides: hidden_size=256 num_heads=4 ..."}
    )
    data: str = field(
        default="stdlib",
        metadata={"help": "'stdlib', a text file, a table, a folder, 'hf:NAME', 'tokens:FOLDER'."},
    )
    data_column: str = field(
        default="text", metadata={"help": "Column of a table that holds text."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read a table or dataset on the fly."})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "'byte' or a Hugging Face tokenizer; else the folder's own, or 'byte'."},
    )
    seq_len: int = field(default=512, metadata={"help": "Tokens per block."})
    sequence_parallel: bool = field(
        default=False, metadata={"help": "All processes of torchrun hold every sequence together."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Resume from output_dir's newest complete checkpoint."}
    )
    max_minutes: float | None = field(
        default=None, metadata={"help": "Stop after this time, as if interrupted, and finish up."}
    )
    prompt: str = field(default="def ", metadata={"help": "Prompt of the sample at the end."})
    sample_tokens: int = field(default=300, metadata={"help": "Length of that sample."})


@dataclass
class Result:
    """The results that a run saves beside the model."""

    bits_per_byte: float
    perplexity: float
    compressed: dict[str, float]
    steps: int
    tokens: int
    parameters: int
    sample: str


def architectures() -> dict[str, type[DecoderConfig]]:
    """Registered model types of this package and their config classes."""
    configs = (getattr(fla.models, name) for name in fla.models.__all__ if name.endswith("Config"))
    return {config.model_type: config for config in configs}


def prepare_model(
    run: RunArguments,
) -> tuple[Callable[[], PreTrainedModel], PreTrainedTokenizerBase]:
    """What builds a fresh model of a registered architecture, or returns a saved one; and its
    tokenizer.
    """
    if Path(run.model).is_dir():
        if run.model_config:
            raise UsageError("--model_config: a saved model has its config; drop the overrides")
        model, tokenizer = load_saved(run.model, run.tokenizer)
        return model.float, tokenizer  # a step may be less than what 16 bits can add to a weight
    tokenizer = load_tokenizer(run.tokenizer or "byte")
    known = architectures()
    if run.model not in known:
        near = difflib.get_close_matches(run.model, known, n=1)
        raise UsageError(
            f"--model: {run.model!r} is not known"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" Registered: {', '.join(sorted(known))}; a folder of a saved model works too"
        )
    values = parse_overrides(run.model_config, known[run.model])
    values = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | values

    def build() -> PreTrainedModel:
        with _naming_model_config():
            return AutoModelForCausalLM.from_config(config)

    with _naming_model_config():
        config = known[run.model](**values)
    return build, tokenizer


@contextmanager
def _naming_model_config() -> Iterator[None]:
    """What a config or its model refuses is the fault of the flag that set it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(f"--model_config: {error}") from error


def parse_overrides(pairs: list[str], config: type[DecoderConfig]) -> dict[str, Any]:
    """`name=value` pairs, values read as YAML, names checked against the config's fields."""
    defaults = {f.name: f.default for f in fields(config)}
    values = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise UsageError(f"--model_config: {pair!r} is not of the form name=value")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            raise UsageError(
                f"--model_config: {config.__name__} has no field {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        values[name] = yaml.safe_load(value)
        number = isinstance(defaults[name], int | float)
        if number and not isinstance(values[name], int | float):
            raise UsageError(f"--model_config: {name} is {value!r}; a number or flag was expected")
    return values


def train(
    run: RunArguments, args: TrainingArguments, argv: list[str] | None = None
) -> Result | None:
    """Train, score on held-out documents, save, plot and sample. Prints as it goes; under
    `torchrun` the first process does what is not training, and the others return None. The saved
    model card shows `argv`, the arguments of the command.
    """
    check_numbers(run, args)
    folder = output_folder(args)
    check_folder(folder)
    with only_writer(folder) if args.process_index == 0 else nullcontext():
        return _train(run, args, folder, argv)


def _train(
    run: RunArguments, args: TrainingArguments, folder: Path, argv: list[str] | None
) -> Result | None:
    console = Console(highlight=False, soft_wrap=True, quiet=args.process_index > 0)
    resume_from = find_resume_point(run, args, folder)
    build, tokenizer = prepare_model(run)
    corpus = load_corpus(run.data, run.data_column, run.streaming)
    torch.manual_seed(args.seed)
    model = build()  # the slowest step: whatever can be wrong with the request was found before it
    blocks = make_blocks(corpus, tokenizer, run.seq_len)
    held_out = None
    if args.eval_strategy != "no":
        held_out = TokenBlocks(corpus.held_out, tokenizer, run.seq_len)
    parameters = model.num_parameters()
    console.print(
        f"model {run.model}: {parameters / 1e6:.2f}M parameters; data {corpus.name}: held out "
        f"{len(corpus.held_out)} documents, {corpus.held_out_bytes() / 1e6:.2f} MB"
    )
    kind = FlaTrainer
    if run.sequence_parallel:
        check_sharded(args)
        kind = ShardedTrainer
    trainer, interruption = make_trainer(
        args, model, blocks, console, kind=kind, max_minutes=run.max_minutes,
        eval_dataset=held_out, processing_class=tokenizer,
    )  # fmt: skip
    run_trainer(trainer, interruption, resume_from)
    if interruption.asked:
        last = newest_whole(folder)
        say(
            f"stopped at step {trainer.state.global_step}; saved {last}. "
            "The same command with --resume true continues"
        )
        raise SystemExit(130)
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return None
    result = finish(run, args, trainer, corpus, tokenizer, console)
    (folder / "results.json").write_text(json.dumps(vars(result), indent=2) + "\n")
    config = trainer.accelerator.unwrap_model(trainer.model).config
    write_card(folder, config, run, args, corpus, result, argv)
    seal(folder)
    return result


def output_folder(args: TrainingArguments) -> Path:
    """The folder that a run saves in."""
    assert args.output_dir is not None  # transformers fills in a default
    return Path(args.output_dir)


def check_sharded(args: TrainingArguments) -> None:
    """Raise `UsageError` where sequences cannot lie on all processes."""
    if args.world_size == 1:
        raise UsageError(
            "--sequence_parallel: one process holds whole sequences anyway; launch several with "
            "torchrun --nproc_per_node"
        )
    if args.eval_strategy != "no":
        raise UsageError(
            "--sequence_parallel: scoring while training runs on whole sequences; drop "
            "--eval_strategy, the run ends with a score"
        )


def find_resume_point(run: RunArguments, args: TrainingArguments, folder: Path) -> Path | None:
    """The checkpoint to resume from: the newest whole one of the folder with --resume, or the one
    that --resume_from_checkpoint names. A new run in a folder that holds checkpoints is refused.
    """
    named = args.resume_from_checkpoint
    if run.resume or str(named).lower() == "true":
        return newest_whole(folder, warn=say)
    if named and str(named).lower() != "false":
        problem = damage(Path(named)) if Path(named).is_dir() else "it does not exist"
        if problem:
            raise UsageError(f"--resume_from_checkpoint: {named} cannot be resumed: {problem}")
        return Path(named)
    if checkpoints(folder):
        raise UsageError(
            f"--output_dir: {folder} already holds checkpoints; add --resume to continue from "
            "them, or choose another folder"
        )
    return None


def short_run(
    folder: Path, steps: int, batch_size: int, learning_rate: float, warmup: float, seed: int
) -> TrainingArguments:
    """Arguments of a cell of `fla task` and `fla study`: a share of the steps warms up, a
    checkpoint is saved halfway, and the folder holds no logs.
    """
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, int(steps * warmup)),
        weight_decay=0.1,
        logging_steps=max(1, steps // 5),
        save_steps=max(1, steps // 2),
        save_total_limit=1,
        seed=seed,
        report_to=[],
    )


def make_trainer(
    args: TrainingArguments,
    model: PreTrainedModel,
    blocks: Any,
    console: Console,
    *,
    kind: Callable[..., FlaTrainer] = FlaTrainer,
    max_minutes: float | None = None,
    **more: Any,
) -> tuple[FlaTrainer, Interruption]:
    """The Trainer (of class `kind`), with our callbacks in place of its printers. `more` goes to
    its constructor.
    """
    args.remove_unused_columns = False
    args.use_cache = True  # it goes into the saved config; training itself keeps no cache
    args.logging_nan_inf_filter = False  # a NaN loss must be seen, not averaged away
    args.disable_tqdm = True
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
    transformers_logging.disable_progress_bar()
    args.prediction_loss_only = True
    guard, progress = LossGuard(), LiveProgress(console)
    interruption = Interruption(max_minutes, say)
    more = dict(data_collator=collate, train_dataset=blocks) | more
    with refusals(args):
        trainer = kind(model, args, callbacks=[interruption, guard, Seal()], **more)
        trainer.get_optimizer_cls_and_kwargs(args, model)  # whose package may be missing
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    for board in trainer.callback_handler.callbacks:
        # not by TENSORBOARD_LOGGING_DIR, which would hold for the process's next run too
        if isinstance(board, TensorBoardCallback) and board.logging_dir is None:
            board.logging_dir = str(output_folder(args) / "logs")
    # it comes first, so that what it adds to a log reaches TensorBoard
    trainer.callback_handler.callbacks.insert(0, progress)
    guard.trainer = progress.trainer = trainer
    return trainer, interruption


def run_trainer(trainer: FlaTrainer, interruption: Interruption, resume_from: Path | None) -> None:
    """Train. If the loss diverges, the error names the last good checkpoint."""
    progress = next(c for c in trainer.callback_handler.callbacks if isinstance(c, LiveProgress))
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except ImportError as error:  # a flag wants a package
        raise UsageError(str(error)) from error
    except RuntimeError as error:
        if "inline_container" in str(error):  # how torch says that a file could not be written
            free = shutil.disk_usage(output_folder(trainer.args)).free
            raise OSError(
                f"a checkpoint could not be written to {output_folder(trainer.args)}, where "
                f"{free / 1e6:.0f} MB are free; make room and go on with --resume true"
            ) from error
        if not isinstance(error, TrainingDiverged):
            raise
        last = newest_whole(output_folder(trainer.args))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved"
        raise TrainingDiverged(
            f"{error}; {kept}. A smaller --learning_rate or --max_grad_norm may help"
        ) from None
    finally:
        progress.stop()
        interruption.restore()


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    length: int,
    bucket: int | None = None,
    console: Console | None = None,
) -> Score:
    """Score the held-out part of a corpus."""
    rows = [torch.from_numpy(encode(tokenizer, text)).long() for text in corpus.held_out]
    total = sum(len(row) - 1 for row in rows)
    shown = console is not None and console.is_terminal
    if not shown:
        return score(model, rows, corpus.held_out_bytes(), length=length, bucket=bucket).whole()
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("scoring held-out text", total=total)
        return score(
            model,
            rows,
            corpus.held_out_bytes(),
            length=length,
            bucket=bucket,
            progress=lambda done: bar.update(task, completed=done),
        ).whole()


def evaluate_together(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    length: int,
    bucket: int | None = None,
) -> Score:
    """`evaluate` by all processes of `torchrun` or `accelerate launch`, each of which scores every
    n-th window; all get the sum. Every process must call it.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    rows = [torch.from_numpy(encode(tokenizer, text)).long() for text in corpus.held_out]
    mine = windows(rows, length)[state.process_index :: state.num_processes]
    share = score(model, mine, 0, length=length, bucket=bucket)
    return sum(gather_object([share]), Score(bytes=corpus.held_out_bytes())).whole()


def sample(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, seed: int
) -> str:
    """A piece of generated text, prompt included."""
    model.eval()
    torch.manual_seed(seed)
    ids = torch.from_numpy(encode(tokenizer, prompt)).long().unsqueeze(0).to(model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def finish(
    run: RunArguments,
    args: TrainingArguments,
    trainer: FlaTrainer,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> Result:
    """Score, compare, plot and sample, and print the results."""
    model: Any = trainer.model
    folder = output_folder(args)
    scored = evaluate(model, tokenizer, corpus, run.seq_len, console=console)
    packed = compressed_bits_per_byte(corpus.held_out)
    table = Table(title=f"held-out text of {corpus.name}")
    table.add_column("coder")
    table.add_column("bits per byte", justify="right")
    rows = {run.model: scored.bits_per_byte, **packed}
    for name, bits in rows.items():
        table.add_row(name, f"{bits:.3f}")
    console.print(table)
    history = trainer.state.log_history
    # a folder's own tokenizer may be that of bytes too
    plot_loss(history, folder / "loss.png", packed, isinstance(tokenizer, ByT5Tokenizer))
    text = sample(model, tokenizer, run.prompt, run.sample_tokens, args.seed)
    console.print("a sample:", style="bold")
    console.print(text, markup=False)
    console.print(
        f"\nmodel, tokenizer, card, results in {folder}\nloss curve {folder / 'loss.png'}\n"
        f"TensorBoard: tensorboard --logdir {folder / 'logs'}\n"
        f"more text: fla generate {folder} --prompt 'class '"
    )
    return Result(
        bits_per_byte=scored.bits_per_byte,
        perplexity=scored.perplexity,
        compressed=packed,
        steps=trainer.state.global_step,
        tokens=trainer.state.global_step
        * run.seq_len
        * args.train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size
        // trainer.ranks_a_batch,
        parameters=model.num_parameters(),
        sample=text,
    )


def plot_loss(history: list[dict], path: Path, packed: dict[str, float], byte_tokens: bool) -> None:
    """The loss curve as a PNG, in bits per byte beside the compressors where tokens are bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(log["step"], log["loss"]) for log in history if "loss" in log]
    if not rows:
        return
    steps, losses = zip(*rows, strict=True)
    unit = math.log(2) if byte_tokens else 1.0
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=140)
    axes.plot(steps, [loss / unit for loss in losses], linewidth=1.6, label="training loss")
    if byte_tokens:
        for (name, bits), style in zip(packed.items(), ("--", ":"), strict=True):
            axes.axhline(
                bits, color="grey", linestyle=style, linewidth=1, label=f"{name} on held-out text"
            )
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte" if byte_tokens else "nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
