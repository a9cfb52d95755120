"""Checkpoints of Hugging Face's transformers, read in timm's names."""

import pytest
import torch

from networks import InputSpec, ModelSpec, adopt_weights, build_classifier
from networks.layouts import translated
from networks.pretrained import normalisation, pretrained_file

LAYER = "vit.encoder.layer.11"
OF_VIT = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    f"{LAYER}.layernorm_before.bias": "blocks.11.norm1.bias",
    f"{LAYER}.layernorm_after.weight": "blocks.11.norm2.weight",
    f"{LAYER}.attention.output.dense.weight": "blocks.11.attn.proj.weight",
    f"{LAYER}.intermediate.dense.bias": "blocks.11.mlp.fc1.bias",
    f"{LAYER}.output.dense.weight": "blocks.11.mlp.fc2.weight",
    "vit.layernorm.weight": "norm.weight",
    "classifier.weight": "classifier.weight",
}
STAGE = "resnet.encoder.stages.3.layers.1"
OF_RESNET = {
    "resnet.embedder.embedder.convolution.weight": "conv1.weight",
    "resnet.embedder.embedder.normalization.running_var": "bn1.running_var",
    f"{STAGE}.layer.0.convolution.weight": "layer4.1.conv1.weight",
    f"{STAGE}.layer.2.normalization.running_mean": "layer4.1.bn3.running_mean",
    f"{STAGE}.shortcut.convolution.weight": "layer4.1.downsample.0.weight",
    f"{STAGE}.shortcut.normalization.bias": "layer4.1.downsample.1.bias",
    "classifier.1.bias": "classifier.1.bias",
}


def test_a_vits_names_are_timms_and_queries_keys_and_values_one_tensor():
    tensors = {name: torch.tensor([float(i)]) for i, name in enumerate(OF_VIT)}
    for i, part in enumerate(("query", "key", "value")):
        tensors[f"{LAYER}.attention.attention.{part}.bias"] = torch.full((2,), float(i))
    tensors["vit.pooler.dense.weight"] = torch.ones(2, 2)  # transformers' own. timm has none
    renamed, layout = translated(tensors)
    assert layout == "transformers' ViT"
    expected = {own: tensors[theirs] for theirs, own in OF_VIT.items()}
    expected["blocks.11.attn.qkv.bias"] = torch.tensor([0.0, 0, 1, 1, 2, 2])
    assert renamed.keys() == expected.keys()
    assert all(torch.equal(renamed[name], value) for name, value in expected.items())


@pytest.mark.parametrize("prefix", ["resnet.", "", "module.resnet."])
def test_a_resnets_names_are_timms_counted_from_one(prefix):
    tensors = {
        name.replace("resnet.", prefix): torch.tensor([float(i)])
        for i, name in enumerate(OF_RESNET)
    }
    renamed, layout = translated(tensors)
    assert layout == "transformers' ResNet"
    assert list(renamed) == list(OF_RESNET.values())
    assert torch.cat(list(renamed.values())).tolist() == list(range(len(OF_RESNET)))


def test_other_names_are_no_layout():
    assert translated({"conv1.weight": torch.ones(1)}) == ({}, "")


def test_a_hubs_directory_says_what_its_inputs_were_like(tmp_path):
    with pytest.raises(ValueError, match="no network is saved there"):
        pretrained_file(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert pretrained_file(tmp_path).name == "model.safetensors.index.json"
    (tmp_path / "pytorch_model.bin").touch()
    assert pretrained_file(tmp_path).name == "pytorch_model.bin"
    assert normalisation(tmp_path) is None
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.2]}')
    assert normalisation(tmp_path) == ([0.5], [0.2])
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"mean": [0.4], "std": [0.3]}}')
    assert normalisation(tmp_path) == ([0.4], [0.3])


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_network_of_transformers_answers_in_timm_as_it_did(tmp_path, kind):
    transformers, name = pytest.importorskip("transformers"), "timm:resnet18"
    pytest.importorskip("timm")
    torch.manual_seed(0)
    if kind == "vit":
        sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        inputs = {"image_size": 32, "num_labels": 7, "layer_norm_eps": 1e-6}
        config = transformers.ViTConfig(**sizes, **inputs)
        theirs = transformers.ViTForImageClassification(config)
        name, options, head = "timm:vit_tiny_patch16_224", {"img_size": 32}, "classifier"
    else:
        sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
        config = transformers.ResNetConfig(**sizes, layer_type="basic", num_labels=7)
        theirs = transformers.ResNetForImageClassification(config)
        options, head = {}, "classifier.1"
    theirs.eval().save_pretrained(tmp_path)
    spec = ModelSpec(name, 7, InputSpec((3, 32, 32), mean=(0.5,), std=(0.5,)), options)
    ours = build_classifier(spec).eval()
    adoption = adopt_weights(ours, pretrained_file(tmp_path), head)
    assert adoption.with_head and "transformers" in adoption.notes[0]
    raw = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs((raw / 255 - 0.5) / 0.5).logits
        torch.testing.assert_close(ours(raw), expected, atol=1e-5, rtol=1e-4)
