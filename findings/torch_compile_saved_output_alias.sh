#!/usr/bin/env bash
# torch 2.11.0, 2026-11-30: under torch.compile the gradients of an autograd.Function are wrong, without an error, if its
# forward saves its result and returns `result.to(dtype)` or `result.contiguous()` that have nothing to do.
#
# Guess: the same as eager. A `to` that changes nothing gives back the same tensor, and to save the tensor that is returned is
# what ctx.save_for_backward is for: written as `return result` it is right.
# Seen: with backend="eager", so that only the tracing by dynamo is in question, the gradients are off by 0.15 and 0.35.
# `return result` and `return result.clone()` are right. torch 2.12.1, 2.13.0 and 2.15.0 are right in every form.
# Such functions are traced in torch/_dynamo/variables/higher_order_ops.py, AutogradFunctionApplyVariable.
# It matters to functions that compute in a wider dtype and cast their result back: right in half precision, wrong in float32.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install --quiet torch==2.11.0 numpy
"$tmp/venv/bin/python" - <<'PY'
import torch


def attention_that_returns(form):
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, pair):
            key, value = pair.split(2, -1)
            weights = (query @ key.mT).softmax(-1)
            result = weights @ value
            ctx.save_for_backward(query, pair, weights, result)
            return form(result)

        @staticmethod
        def backward(ctx, grad):
            query, pair, weights, result = ctx.saved_tensors
            key, value = pair.split(2, -1)
            scores = weights * (grad @ value.mT - (grad * result).sum(-1, keepdim=True))
            return scores @ key, torch.cat((scores.mT @ query, weights.mT @ grad), -1)

    return lambda query, pair: Attention.apply(query * 1, pair * 1)


torch.manual_seed(0)
query = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
pair = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
forms = {
    "result": (lambda result: result, True),
    "result.clone()": (lambda result: result.clone(), True),
    "result.to(result.dtype)": (lambda result: result.to(result.dtype), False),
    "result.contiguous()": (lambda result: result.contiguous(), False),
}
for name, (form, expected) in forms.items():
    run = attention_that_returns(form)
    eager = torch.autograd.grad(run(query, pair).cos().sum(), [query, pair])
    torch._dynamo.reset()
    traced = torch.compile(run, backend="eager", fullgraph=True)
    compiled = torch.autograd.grad(traced(query, pair).cos().sum(), [query, pair])
    errors = [float((a - b).abs().max()) for a, b in zip(eager, compiled)]
    print(torch.__version__, f"return {name}:", "errors of the gradients", errors)
    assert (max(errors) < 1e-12) == expected, "the behaviour has changed"
PY
