"""llama.cpp as the judge of GGUF files: its server in this process, from the wheel xllamacpp."""

import json
import urllib.request

import pytest
import torch

xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")


class LlamaCpp:
    """A GGUF file in llama.cpp. Its attention and its cache are in float32, as the weights may be."""

    def __init__(self, file, context=256):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.port = str(file), context, 0
        params.n_parallel, params.warmup, params.fit_params, params.verbosity = 1, False, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)
        self.encode("")  # a server that is given up before its first answer waits for ever

    def _post(self, path, **data):
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def encode(self, text, begins=False):
        """Token ids, no control token read out of the text; `begins`: with what stands before a text."""
        return self._post("/tokenize", content=text, add_special=begins, parse_special=False)["tokens"]

    def greedy(self, ids, count):
        """The most likely tokens, one after the other."""
        answer = self._post("/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True)
        return answer["tokens"]

    def stops_at(self, ids, token_id):
        """Whether this token, said next, ends a text."""
        said = [[token_id, 1000.0]]
        answer = self._post("/completion", prompt=ids, n_predict=3, temperature=0, logit_bias=said)
        return answer["stop_type"] == "eos"

    def log_probabilities(self, ids, vocab_size, printable):
        """Those of all next tokens, (vocab_size,).

        Args:
            printable: a token of whole characters, which is made to come next. llama.cpp reports nothing
                about a part of a character. The probabilities are those before.
        """
        said = [[printable, 1000.0]]
        answer = self._post(
            "/completion", prompt=ids, n_predict=1, temperature=0, n_probs=vocab_size, logit_bias=said
        )
        found = torch.full((vocab_size,), torch.nan)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    def prompt_ids(self, messages):
        """The token ids of a conversation, laid out by the chat template in the file."""
        prompt = self._post("/apply-template", messages=messages)["prompt"]
        return self._post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
