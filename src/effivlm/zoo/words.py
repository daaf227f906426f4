"""The zoo's language: a closed vocabulary, its tokenizer and chat template.

Questions end with what is asked about, and the answer follows at once: a tiny model then finds it
in one step of attention, from the word to the tokens that show it, instead of two.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
}
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
}
SHAPES = tuple(PLURALS)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
ORDINALS = ("first", "second", "third", "fourth")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
LABELS = ("name", "date", "total", "code", "city", "item", "tax", "room", "phone", "order")
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
NOTHING = "nothing"  # what an empty patch shows
_QUESTIONS = (
    "what number is written word list all shapes colour the shape where there a how many yes no"
    " value of which larger or picture shows above below to bar tip and not"
)
SPECIAL = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<video>",
    "<user>",
    "<assistant>",
    "<img>",
    "</img>",
)
TEMPLATE = (
    "{%- set ordinals = ['"
    + "', '".join(ORDINALS)
    + "'] -%}<s>{%- for m in messages -%}{%- set count = namespace(seen=0) -%}{%- if m['role'] =="
    " 'user' -%}<user>{%- endif -%}{%- if m['content'] is string -%}{{ ' ' + m['content'] }}{%-"
    " else -%}{%- for part in m['content'] -%}{%- if part['type'] == 'image' -%}{{ ' ' +"
    " ordinals[count.seen % 4] + 'IMAGE' }}{%- set count.seen = count.seen + 1 -%}{%- else -%}{{"
    " ' ' + part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- if m['role'] =="
    " 'assistant' -%}</s>{%- endif -%}{%- endfor -%}"
)


def vocabulary() -> list[str]:
    """Every token: words with the space before them, single characters without, the space itself,
    punctuation.
    """
    names = [
        NOTHING,
        *COLOURS,
        *SHAPES,
        *PLURALS.values(),
        *NUMBERS,
        *ORDINALS,
        *ROWS,
        *COLUMNS,
        *LABELS,
        *_QUESTIONS.split(),
    ]
    words = [f" {w}" for w in dict.fromkeys(names)]
    return [*SPECIAL, *words, *LETTERS, *DIGITS, " ", " ?", " .", " ,"]


def token_of(word: str) -> str:
    """The token of a word or of a single character."""
    return word if len(word) == 1 and word in LETTERS + DIGITS else f" {word}"


def spelled(answer: str) -> str:
    """An answer as it follows the question: words take the space before them."""
    return f" {answer}" if answer[0].islower() else answer


def chat_template(wrapped: bool) -> str:
    """The chat template: pictures are numbered by words; ``wrapped`` puts ``<img>`` and ``</img>``
    around each.
    """
    return TEMPLATE.replace("IMAGE", "<img><image></img>" if wrapped else "<image>")


def make_tokenizer(wrapped: bool = True) -> PreTrainedTokenizerFast:
    """Words, single capital letters and single digits."""
    tokens = vocabulary()
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" [a-z]+|[a-z]+|[A-Z]|[0-9]| [?.,]|[?.,]| "), "isolated"
    )
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    names = {
        "image_token": "<image>",
        "video_token": "<video>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<image>",
        "user_token": "<user>",
        "assistant_token": "<assistant>",
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=names,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template(wrapped)
    return fast
