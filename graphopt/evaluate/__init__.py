"""How good a language model is: perplexity and PIQA of anything that gives logits."""

from graphopt.execute.language_model import LanguageModel, ProgramModel, load_tokenizer

__all__ = ["LanguageModel", "ProgramModel", "load_tokenizer"]
