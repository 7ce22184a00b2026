"""A byte-level BPE of 512 tokens, trained on the spot on the text below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_prfaas.tiny_models.configs import BOS, CONTEXT_TOKENS, EOS, PAD, VOCABULARY
from sglang_prfaas.tiny_models.vocabulary import SPECIAL_TOKENS

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] if message['role'] in ('system', 'assistant') else 'user' }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% elif message['content'] %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

TEXT = """
A request arrives with a long prompt. Its prefix may already lie in a cache, so only what is missing must be computed.
Prefill reads the whole prompt at once and is bound by arithmetic; decode writes one token at a time and is bound by
memory. They want different machines, and so a server is split in two: one site fills the cache, the other answers.
What travels between them is the key and value cache of the attention layers and, for hybrid models, a recurrent state
whose size does not depend on the length of the prompt. A router looks at the length, at the queues and at the link,
and then decides: near, or far away. When the link is slow it keeps short requests at home; when the link is idle it
sends the long ones out. The quick brown fox jumps over the lazy dog, and the river runs past the old stone bridge.
In spring the children walk to school along the canal; in winter they skate on it. One, two, three, four, five, six,
seven, eight, nine, ten. Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. Who, what, when, where, why?
def add(left, right): return left + right
for index in range(100): total = total + values[index] * weights[index]
{"name": "tiny", "layers": 4, "hidden": 128, "tokens": [1, 2, 3], "cached": true, "next": null}
"""


def write_tokenizer(directory: Path) -> None:
    """Train and save the tokenizer with its chat template, as files of transformers' fast tokenizer.

    Needs ``tokenizers`` and ``transformers``. Plain text gets no BOS; the chat template writes one.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    make_trainer: Any = trainers.BpeTrainer  # a compiled class without annotations
    trainer = make_trainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True) for _, text in sorted(SPECIAL_TOKENS.items())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    if backend.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"the tokenizer has {backend.get_vocab_size()} tokens, expected {VOCABULARY}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token=SPECIAL_TOKENS[PAD],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
