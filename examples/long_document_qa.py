"""Read a long document once into a compressed cache, then ask several questions about it.

    python examples/long_document_qa.py                             # a president's message, SmolLM2-135M
    python examples/long_document_qa.py --model MODEL --codebooks CODEBOOKS --document FILE --question "..."

The document is compressed when it has been read; each question is answered from the codes, and then taken out of the
cache again. Answers of the small default model are often wrong, with either cache: try your own model.
"""

import argparse
from pathlib import Path

import torch

from transformers_gsrq import GSRQCache, GSRQCodebooks
from transformers_gsrq.demo import (
    DEFAULT_FOLDER,
    load_embedded_codebooks,
    load_embedded_model,
    load_embedded_texts,
)
from transformers_gsrq.loading import load_model, read_texts

QUESTIONS = ["What is this text about?", "Who is speaking, and to whom?"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="local folder, Hub id or GGUF file")
parser.add_argument("--codebooks", help="local folder or Hub id")
parser.add_argument("--document", type=Path, help="UTF-8 text file")
parser.add_argument("--question", action="append", help="may be repeated")
parser.add_argument("--document-tokens", type=int, default=2000, help="read at most so many tokens")
parser.add_argument("--max-new-tokens", type=int, default=60)
args = parser.parse_args()

model, tokenizer = load_model(args.model) if args.model else load_embedded_model(DEFAULT_FOLDER)
if args.codebooks:
    codebooks = GSRQCodebooks.from_pretrained(args.codebooks)
else:
    codebooks = load_embedded_codebooks(model, tokenizer, DEFAULT_FOLDER)
text = read_texts([args.document])[0] if args.document else load_embedded_texts()[1][1]
text = tokenizer.decode(tokenizer(text, verbose=False)["input_ids"][: args.document_tokens])


def prompt_ids(question: str) -> torch.Tensor:
    """Token ids of the document and a question, as the model's chat template has it."""
    messages = [{"role": "user", "content": f"{text}\n\nQuestion: {question}"}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ].to(model.device)


questions = args.question or QUESTIONS
prompts = [prompt_ids(question) for question in questions]
# What all prompts have in common at their beginning is read once; each keeps at least its last token.
shortest = min(ids.shape[1] for ids in prompts)
starts = torch.cat([ids[:, : shortest - 1] for ids in prompts])
shared = int((starts == starts[0]).all(0).cumprod(0).sum())
cache = GSRQCache(codebooks, model)
with torch.inference_mode():
    model(input_ids=prompts[0][:, :shared], cache=cache, use_cache=True, logits_to_keep=1)
print(f"{shared} tokens read once.\n{cache.memory()}\n")

for question, ids in zip(questions, prompts, strict=True):
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=args.max_new_tokens,
            do_sample=False,
        )  # fmt: skip
    print(f"{question}\n  {tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()}\n")
    cache.crop(shared - cache.get_seq_length())  # forget the question and the answer, keep the document
