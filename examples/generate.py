"""Generate from the same prompt with the plain cache and with a compressed one, and compare text and memory.

python examples/generate.py                                     # the model and codebooks of `make demo`
python examples/generate.py --model MODEL --codebooks CODEBOOKS --prompt "..."
"""

import argparse

import torch
from transformers import DynamicCache

from transformers_gsrq import GSRQCache, GSRQCodebooks
from transformers_gsrq.demo import DEFAULT_FOLDER, load_embedded_codebooks, load_embedded_model
from transformers_gsrq.loading import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="local folder, Hub id or GGUF file")
parser.add_argument("--codebooks", help="local folder or Hub id")
parser.add_argument("--prompt", default="Explain in a few sentences why the sea is salty.")
parser.add_argument("--max-new-tokens", type=int, default=120)
args = parser.parse_args()

model, tokenizer = load_model(args.model) if args.model else load_embedded_model(DEFAULT_FOLDER)
if args.codebooks:
    codebooks = GSRQCodebooks.from_pretrained(args.codebooks)
else:
    codebooks = load_embedded_codebooks(model, tokenizer, DEFAULT_FOLDER)

messages = [{"role": "user", "content": args.prompt}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
inputs = inputs.to(model.device)
prompt_length = inputs["input_ids"].shape[1]

# A short window, so that even a short answer is mostly read back from codes. The default is 128.
caches = {
    "plain cache": DynamicCache(config=model.config),
    "compressed cache": GSRQCache(codebooks, model, residual_length=32),
}
for name, cache in caches.items():
    with torch.inference_mode():
        out = model.generate(**inputs, cache=cache, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(f"--- {name}\n{tokenizer.decode(out[0, prompt_length:], skip_special_tokens=True)}\n")
print(caches["compressed cache"].memory())
