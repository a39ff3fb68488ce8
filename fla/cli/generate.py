# SPDX-License-Identifier: MIT
"""Continue a prompt with a trained model, streamed to the terminal."""

from __future__ import annotations

from fla.cli.common import command_parser, load


def main(argv: list[str]) -> int:
    parser = command_parser("generate", __doc__)
    parser.add_argument("checkpoint", help="folder of a saved model")
    parser.add_argument("--tokenizer", help="'byte' or one of Hugging Face; else the checkpoint's")
    parser.add_argument("--prompt", default="def ", help="text to go on from")
    parser.add_argument("--max_new_tokens", type=int, default=300)
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token"
    )
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, ...; the best available by default")
    args = parser.parse_args(argv)

    import torch
    from transformers import TextStreamer

    from fla.data.tokens import encode

    model, tokenizer = load(args.checkpoint, args.device, args.tokenizer)
    torch.manual_seed(args.seed)
    ids = torch.from_numpy(encode(tokenizer, args.prompt)).long().unsqueeze(0).to(model.device)
    sampling = (
        dict(do_sample=True, temperature=args.temperature, top_p=args.top_p)
        if args.temperature > 0
        else dict(do_sample=False)
    )
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
    return 0
