"""A batch of prompts in onnxruntime-genai.

retnet-tools export ckpt/ --to genai && python examples/genai.py ckpt-genai
"""

import sys

import onnxruntime_genai as og

folder = (sys.argv[1:] or ["ckpt-genai"])[0]
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
prompts = tokenizer.encode_batch(["ROMEO. ", "HAMLET.\nTo be, or not to be"]).as_numpy()
params = og.GeneratorParams(model)
params.set_search_options(batch_size=len(prompts), max_length=prompts.shape[1] + 20)
generator = og.Generator(model, params)
generator.append_tokens(prompts)
while not generator.is_done():
    generator.generate_next_token()
for row in range(len(prompts)):
    print(tokenizer.decode(generator.get_sequence(row)))
