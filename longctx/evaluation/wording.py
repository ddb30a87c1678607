"""How facts are told and asked for. One wording for any model, one for the form that the demo model was trained on.

``plain`` follows Mohtashami & Jaggi (2023), section 4.2, for pass keys and RULER (Hsieh et al., 2024, arXiv 2404.06654,
appendix B) for the rest; ``demo`` is the wording of ``longctx/models/demo_data.py``.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Form:
    """One kind of fact; ``{name}`` and ``{value}`` are filled in."""

    sentence: str
    question: str
    lead: str  # how the answer begins

    def tell(self, name: str, value: str) -> str:
        """The sentence that holds the fact."""
        return self.sentence.format(name=name, value=value)


@dataclass(frozen=True, slots=True)
class Wording:
    """All that differs between styles."""

    preamble: str
    pass_key: Form
    fact: Form
    fact_values: Form  # one name with several values, or several names
    num_digits: int  # of a fact's value


STYLES = {
    "plain": Wording(
        preamble=(
            "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
            "I will quiz you about it afterwards.\n\n"
        ),
        pass_key=Form(
            "The pass key is {value}. Remember it. {value} is the pass key.",
            "What is the pass key?",
            " The pass key is",
        ),
        fact=Form(
            "One of the special magic numbers for {name} is: {value}.",
            "What is the special magic number for {name} mentioned in the text?",
            " The special magic number for {name} mentioned in the text is",
        ),
        fact_values=Form(
            "One of the special magic numbers for {name} is: {value}.",
            "What are all the special magic numbers for {name} mentioned in the text?",
            " The special magic numbers for {name} mentioned in the text are",
        ),
        num_digits=7,
    ),
    "demo": Wording(
        preamble="",
        pass_key=Form("The pass key is {value}. Remember it.", "What is the pass key?", " The pass key is"),
        fact=Form("{name} = {value}", "What is the value of {name}?", " The value of {name} is"),
        fact_values=Form("{name} = {value}", "What are the values of {name}?", " The values of {name} are"),
        num_digits=5,
    ),
}
