"""A small tokenizer in the style of Llama 2 and Mistral: U+2581 for spaces, bytes as `<0x0A>`, `<s>` in front."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors


def save_sentencepiece_style(folder: Path) -> Tokenizer:
    """Write tokenizer.json into the folder; the library's tokenizer."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "th", "▁th", "▁the", "in", "ing", "▁▁"]
    merges = [("▁", "a"), ("t", "h"), ("▁", "th"), ("▁th", "e"), ("i", "n"), ("in", "g"), ("▁", "▁")]
    vocab = {token: place for place, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    return backend
