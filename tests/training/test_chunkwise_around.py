"""What users put around a model: adapters of other kinds, hooks, torch.compile, no_grad. Exact, or refused."""

import peft
import pytest
import torch
from chunkwise_cases import assert_same, chunked, plain, rounding, taken
from models import build, tokens
from schedules import documents, pad
from torch import nn

from lcpatch.core.errors import UnsupportedModelError
from lcpatch.training import chunkwise, support
from lcpatch.training.fused import can_fuse, fused_loss


def adapted(kind: str, tied: bool = False, **settings) -> nn.Module:
    """A model in float64 with an adapter that changes what it computes."""
    torch.manual_seed(1)
    config = getattr(peft, f"{kind}Config")(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(build(tie_word_embeddings=tied), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double().train()


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_of_the_embeddings(tied: bool):
    """They lie in the embeddings, and change a head that is tied to them: it has a gradient for them, too."""
    model, ids = adapted("Lora", tied, trainable_token_indices=[5, 7, 9]), tokens(2)
    want, allowed = plain(model, ids, ids), rounding(model)
    assert_same(chunked(model, ids, ids, 16), want, allowed)
    model.zero_grad()
    loss = fused_loss(model, {"input_ids": ids, "labels": ids, "use_cache": False})
    loss.backward()
    assert_same((loss.item(), taken(model)), want, allowed)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("AdaLora", {"total_step": 9}, "its adapter says another"),
        ("Lora", {"alora_invocation_tokens": [5]}, "aLoRA"),
    ],
)
def test_adapters_that_a_chunk_would_change(kind: str, settings: dict, says: str):
    model, ids = adapted(kind, **settings), tokens(2)
    with pytest.raises(UnsupportedModelError, match=says):
        chunked(model, ids, ids, 16)
    assert can_fuse(model) == (kind == "Lora")


def test_hooks_of_parameters():
    """One that changes a gradient does so once, of the head's parameters as well; one that follows it is refused."""
    model, ids = build().double().train(), tokens(2)
    handles = [p.register_hook(lambda grad: 3 * grad) for p in model.parameters()]
    want, allowed = plain(model, ids, ids), rounding(model)
    assert_same(chunked(model, ids, ids, 16), want, allowed)
    for handle in handles:
        handle.remove()
    assert_same(chunked(model, ids, ids, 16), plain(model, ids, ids), allowed)
    handle = model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="it would run after every chunk"):
        chunked(model, ids, ids, 16)
    handle.remove()
    assert_same(chunked(model, ids, ids, 16), plain(model, ids, ids), allowed)


@pytest.mark.parametrize("what", ["model", "in place", "layers", "mlps"])
def test_torch_compile(what: str):
    """With our attention, whose stand-ins for keys no compiler can look into."""
    model, ids = build().double().train(), tokens(2)
    want, allowed = plain(model, ids, ids), rounding(model)
    if what == "in place":
        model.compile(backend="eager")
    for number, layer in enumerate(model.model.layers):
        if what == "mlps":
            layer.mlp.compile(backend="eager")
        elif what == "layers":
            model.model.layers[number] = torch.compile(layer, backend="eager")
    compiled = torch.compile(model, backend="eager") if what == "model" else model
    compiled.zero_grad()
    loss = chunkwise.backward(compiled, input_ids=ids, labels=ids, chunk_size=16, attention="lcpatch")
    grads = {name.replace("_orig_mod.", ""): grad for name, grad in taken(model).items()}
    assert_same((float(loss), grads), want, allowed)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_compiled_inside_of_layers_stays_so(in_place: bool):
    """As FlexAttention, which holds all scores where it is not compiled; and afterwards the model is compiled again."""
    made: list[str] = []

    def backend(what: str):
        return lambda graph, _: made.append(what) or graph.forward

    model, ids = build().train(), tokens(2)
    for layer in model.model.layers:
        layer.mlp.compile(backend=backend("mlp"))
    compiled = torch.compile(model, backend=backend("model")) if not in_place else model
    if in_place:
        model.compile(backend=backend("model"))
    chunkwise.backward(compiled, input_ids=ids, labels=ids, chunk_size=16)
    assert set(made) == {"mlp"}
    compiled(input_ids=ids, use_cache=False)
    assert "model" in made


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(off: type):
    model, ids = build(), tokens(2)
    with off(), pytest.raises(ValueError, match="gradients are off here"):
        chunkwise.backward(model, input_ids=ids, labels=ids, chunk_size=16)


def test_labels_of_pads(monkeypatch: pytest.MonkeyPatch):
    """Transformers lets those behind a text attend to it, our attention to nothing."""
    model, (ids, mask) = build().double().train(), pad(documents(), "right")
    with pytest.raises(ValueError, match="pads behind a text have labels"):
        chunked(model, ids, ids, 16, attention_mask=mask, attention="lcpatch")
    monkeypatch.setattr(support, "_has_kernel", lambda base: True)  # "auto" as on a GPU
    want = plain(model, ids, ids, attention_mask=mask)
    assert_same(chunked(model, ids, ids, 16, attention_mask=mask), want, rounding(model))


def test_a_routers_loss_that_a_call_asks_for():
    model, ids = build("gpt_oss"), tokens(2)
    with pytest.raises(ValueError, match="output_router_logits: the routers' auxiliary loss"):
        chunked(model, ids, ids, 16, output_router_logits=True)
