"""Sentences as people type them: understood as a person would, or refused with the true reason and a way out. Nothing
of another tool's is passed on as words."""

import pytest

from layerdiffusion.base.core import BadInput
from layerdiffusion.settings import EditConfig
from layerdiffusion.words import plain_words, split_text

PLAIN = "a dog jumping | in a forest"


def refused(text, *words, **parts):
    "The one sentence of a refusal; it holds all the words."
    with pytest.raises(BadInput) as stop:
        split_text(text, **parts)
    said = str(stop.value)
    assert "\n" not in said and said.endswith(".") and not [w for w in words if w not in said], said
    return said


@pytest.mark.parametrize(
    "frame",
    [
        "“{}”",
        '"{}"',
        "'{}'",
        "‘{}’",
        "„{}“",
        "‚{}‘",
        "«{}»",
        "« {} »",
        "»{}«",
        "‹{}›",
        "「{}」",
        "『{}』",
        "《{}》",
        "``{}''",
        "＂{}＂",
        "❝{}❞",
        "“{}.”",
        "“{}”.",
        "{}!!!",
        "{}...",
        "{}…",
        "{};",
        "{}:",
        "{},",
        "{} .",
        "  {}\n",
        "\ufeff{}",
        "{}\u200b",
        "{}, please",
        "{} please!",
        "Please, {}",
        "{}. Thank you!",
        "{} thanks",
    ],
)
def test_frames_of_a_sentence(frame):
    "Quotation marks of any language, punctuation and politeness around a sentence change nothing."
    assert str(split_text(frame.format("a dog jumping in a forest"))) == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        "a dog\njumping in a forest",
        "a  dog jumping\tin   a forest",
        "a dog\r\n\r\njumping in a forest",
        "a\u00a0dog jumping in\u2009a forest",
        "“a dog” jumping in a “forest”",
        "a ‘dog’ jumping in a 'forest'",
        "a dog jumping… in a forest",
        "a dog jumping ... in a forest",
        "ａ dog jumping in a forest",
        "a dog \x00jumping in a forest",
        "a do\u00adg jumping in a forest",
    ],
)
def test_signs_inside_a_sentence(text):
    assert str(split_text(text)) == PLAIN


@pytest.mark.parametrize(
    "text, split",
    [
        ("a dog — jumping — in a forest", "a dog, jumping | in a forest"),
        ("a dog , jumping ,in a forest", "a dog, jumping | in a forest"),
        ("the dog’s puppy jumping in a forest", "the dog's puppy jumping | in a forest"),
        ("the dogs’ bed in a kitchen", "the dogs' bed | in a kitchen"),
        ("a dog that’s running in a park", "a dog running | in a park"),
        ('a 12" pizza on a table', "a 12-inch pizza | on a table"),
        ("a dog w/ a hat in a forest", "a dog with a hat | in a forest"),
        ("What a cute dog sitting on a sofa!", "a cute dog sitting | on a sofa"),
        ("a dog jumping in St. Moritz", "a dog jumping | in St. Moritz"),
        ("A dog sitting in front of Mt. Fuji.", "a dog sitting | in front of Mt. Fuji"),
        ("a dog sitting on a street in the U.S.", "a dog sitting | on a street in the U.S."),
        ("a dog in Washington D.C. at night", "a dog | in Washington D.C. at night"),
        ("Mr. Smith and Mrs. Jones dancing in a park", "Mr. Smith and Mrs. Jones dancing | in a park"),
        ("J. K. Rowling sitting in a cafe", "J. K. Rowling sitting | in a cafe"),
        ("a dog at No. 5 on Fifth Ave. in New York", "a dog | at No. 5 on Fifth Ave. in New York"),
        ("a cat in the style of Dr. Seuss on a hill", "a cat in the style of Dr. Seuss | on a hill"),
        ("a dog, a cat, etc. in a forest", "a dog, a cat, etc. | in a forest"),
        ("a St. Bernard lying in the snow", "a St. Bernard lying | in the snow"),
    ],
)
def test_understood(text, split):
    assert str(split_text(text)) == split


@pytest.mark.parametrize(
    "text, split",
    [
        ("The dog has a red collar and is sitting on a sofa", "the dog has a red collar and is sitting | on a sofa"),
        (
            "a woman in a wheelchair playing basketball in a gym",
            "a woman in a wheelchair playing basketball | in a gym",
        ),
        (
            "by the sea with a palm on the left, a small black cat with a scarf lying",
            "a small black cat with a scarf lying | by the sea with a palm on the left",
        ),
        ("My sister's wedding cake on a table", "My sister's wedding cake | on a table"),
        ("a kid's drawing of a house on a fridge", "a kid's drawing of a house | on a fridge"),
        ("the dog's running in a park", "the dog running | in a park"),
        ("a close up of a cat's eye in the dark", "a cat's eye | in the dark"),
        (
            "A black Labrador swimming in a lake with a stick in its mouth",
            "a black Labrador swimming with a stick in its mouth | in a lake",
        ),
        ("A girl in a yellow raincoat jumping in puddles", "a girl in a yellow raincoat jumping | in puddles"),
        ("a woman in a red sari in Mumbai", "a woman in a red sari | in Mumbai"),
        ("A woman smiling in a kitchen", "a woman smiling | in a kitchen"),
        ("a dog barking in a yard", "a dog barking | in a yard"),
        ("a girl smiling at the camera in a garden", "a girl smiling at the camera | in a garden"),
        ("a cat by the fire", "a cat | by the fire"),
        ("a cat next to a camera", "a cat | next to a camera"),
        ("a house on fire in a forest", "a house on fire | in a forest"),
        ("A goat on a mountain top", "a goat | on a mountain top"),
        ("There's a dog in the garden", "a dog | in the garden"),
        ("This is a photo of my dog in the park", "my dog | in the park"),
        ("This image shows a dog in a park", "a dog | in a park"),
        ("In this photo, a dog sits on a sofa", "a dog sits | on a sofa"),
        ("On a hill stands a castle", "a castle stands | on a hill"),
        ("In the garden is a small cat", "a small cat | in the garden"),
        ("a dog stands in the snow while it is snowing", "a dog stands | in the snow while it is snowing"),
        ("My dog, but on a beach", "My dog | on a beach"),
        ("a dog @ the beach", "a dog | at the beach"),
        ("a C++ book on a desk", "a C++ book | on a desk"),
        ("a man in the style of Dr. No on an island", "a man in the style of Dr. No | on an island"),
        ("Peter Pan in Never Land", "Peter Pan | in Never Land"),
        ("soldiers in No Man's Land", "soldiers | in No Man's Land"),
        ("a dog not far off in a field", "a dog not far off | in a field"),
    ],
)
def test_plain_english(text, split):
    "Captions as people write them."
    assert str(split_text(text)) == split


@pytest.mark.parametrize(
    "text, split",
    [
        ("a can of soda on a table", "a can of soda | on a table"),
        ("Will Smith standing in a forest", "Will Smith standing | in a forest"),
        ("set of cups on a table", "set of cups | on a table"),
        ("a place of worship on a hill", "a place of worship | on a hill"),
        ("show dog jumping in a forest", "show dog jumping | in a forest"),
        ("make-up artist standing in a studio", "make-up artist standing | in a studio"),
        ("I-beam on a building site", "I-beam | on a building site"),
        ("a dog about to jump in a pool", "a dog about to jump | in a pool"),
        ("a dog can be seen jumping in a forest", "a dog can be seen jumping | in a forest"),
        ("a knot on a table", "a knot | on a table"),
        ("a dog in the middle of nowhere", "a dog | in the middle of nowhere"),
        ("a dog with 3 balls, 2 of them red, on a lawn", "a dog with 3 balls, 2 of them red | on a lawn"),
        ("a white-haired man sitting in a café", "a white-haired man sitting | in a café"),
        ("crème brûlée on a plate", "crème brûlée | on a plate"),
        ("café au lait on a table", "café au lait | on a table"),
        ("a dog on the Place de la Concorde in Paris", "a dog | on the Place de la Concorde in Paris"),
        ("El Capitan at sunset", "El Capitan | at sunset"),
        ("UN soldier in desert", "UN soldier | in desert"),
        ("Rio de Janeiro at night", "Rio de Janeiro | at night"),
        ("a woman in São Paulo", "a woman | in São Paulo"),
        ("a fox in its den in the woods", "a fox | in its den in the woods"),
        ("a man with a hat on a hill", "a man with a hat | on a hill"),
        ("dog jumping in forest", "dog jumping | in forest"),
        ("A DOG AND A CAT JUMPING IN A FOREST", "a DOG AND A CAT JUMPING | IN A FOREST"),
        ("a dog at 10:30 on a beach", "a dog | at 10:30 on a beach"),
        ("a man in a $100 suit on a street", "a man in a $100 suit | on a street"),
        ("a dog & a cat sitting on a sofa", "a dog & a cat sitting | on a sofa"),
        ("rock 'n' roll band playing on a stage", "rock n roll band playing | on a stage"),
    ],
)
def test_what_is_only_alike(text, split):
    "Words that begin a command, a question, a negation or another language elsewhere, in plain descriptions."
    assert str(split_text(text)) == split


TOOLS = [
    ("a (dog:1.3) jumping in a forest", "(dog:1.3)"),
    ("a (dog) jumping in a forest", "(dog)"),
    ("a ((dog)) jumping in a forest", "((dog))"),
    ("a [dog] jumping in a forest", "[dog]"),
    ("a {dog} jumping in a forest", "{dog}"),
    ("a {{dog}} jumping in a forest", "{{dog}}"),
    ("（dog：1.3） jumping in a forest", "(dog:1.3)"),
    ("a [dog:cat:0.5] jumping in a forest", "[dog:cat:0.5]"),
    ("a dog:1.3 jumping in a forest", "dog:1.3"),
    ("a dog::2 jumping in a forest::1", "dog::2"),
    ("a dog++ jumping in a forest", "dog++"),
    ("a dog jumping in a forest--", "forest--"),
    ("a dog jumping in a forest --ar 16:9", "--ar 16:9"),
    ("a dog jumping in a forest --v 5 --q 2", "--v 5"),
    ("a dog jumping in a forest —ar 16:9", "—ar 16:9"),
    ("a dog jumping in a forest –stylize 100", "–stylize 100"),
    ("a dog jumping in a forest -W 512 -H 512", "-W 512"),
    ("a dog jumping in a forest ar 16:9", "ar 16:9"),
    ("/imagine a dog jumping in a forest", "/imagine"),
    ("a dog jumping in a forest <lora:x:1>", "<lora:x:1>"),
    ("a <cat-toy> in a forest", "<cat-toy>"),
    ("a dog BREAK in a forest", "BREAK"),
    ("a dog AND a cat in a forest", "AND"),
    ("a dog jumping | in a forest", "|"),
    ("a dog|cat in a forest", "dog|cat"),
    ("prompt: a dog jumping in a forest", "prompt:"),
    ("subject: a dog, background: in a forest", "subject:"),
    ("a dog in a forest, Negative prompt: hat", "Negative prompt:"),
    ("a dog -> a cat in a forest", "->"),
    ("a dog → a cat in a forest", "→"),
    ("1girl, long_hair in a forest", "long_hair"),
    ("a dog in a forest #art", "#art"),
    ("a **dog** in a forest", "**dog**"),
    ("a dog \\(brown\\) in a forest", "\\"),
    ("a dog in a forest :)", ":)"),
    ("a dog in https://a.b/c.png", "https://a.b/c.png"),
    ("a $subject in a forest", "$subject"),
    ("a __animal__ in a forest", "__animal__"),
    ("embedding:toy dog in a forest", "embedding:toy"),
    ("a dog in a forest, cfg scale 7", "cfg scale 7"),
    ("a dog in a forest seed 42", "seed 42"),
    ("a dog in a forest strength 0.7", "strength 0.7"),
    ("a dog in a forest, sampler: euler", "sampler: euler"),
    ("a dog in a forest 512x768", "512x768"),
    ("prompt=a dog in a forest", "prompt="),
    ("@dog in a forest", "@dog"),
    ("a dog in a forest ~~", "~~"),
    ("a dog &amp; a cat in a forest", "&amp;"),
    ("a dog in a forest&nbsp;", "&nbsp;"),
]


@pytest.mark.parametrize("text, found", TOOLS)
def test_other_tools(text, found):
    "Weights, options, operators and labels are named, in a sentence and in every other text that becomes words."
    said = refused(text, repr(found)[1:-1] if "\\" not in found else "\\\\", "read as words")
    assert said.startswith("The target text holds")
    for part in ("object", "background"):
        assert refused("a dog in a forest", "read as words", **{part: text}).startswith(f"The {part} text holds")
    with pytest.raises(BadInput, match="read as words"):
        EditConfig(negative_prompt=text)


@pytest.mark.parametrize(
    "text, way_out",
    [
        ("a dog in a forest --no hat", "--negative-prompt"),
        ("a dog | in a forest", "--object and --background"),
        ("a dog in www.place.org", "--reference"),
        ("a dog in a forest --ar 16:9", "--help"),
    ],
)
def test_ways_out(text, way_out):
    refused(text, way_out)


@pytest.mark.parametrize(
    "sign, name",
    [
        ("🐶", "dog face"),
        ("☀️", "black sun with rays"),
        ("❤", "heavy black heart"),
        ("👩‍🚀", "woman"),
        ("🇩🇪", "regional indicator"),
        ("1️⃣", "keycap"),
        ("\ud83d", "U+D83D"),
        ("\ue000", "U+E000"),
    ],
)
@pytest.mark.parametrize("frame", ["a {} jumping in a forest", "a dog jumping in a forest {}"])
def test_signs_for_words(sign, name, frame):
    refused(frame.format(sign), name, "say in words")


QUESTIONS = [
    "Can you make the dog jump in a forest?",
    "could you put it on a beach",
    "Would you please show a dog in a forest",
    "Is the dog in a forest?",
    "Where is the dog in the forest",
    "How about a dog in a forest?",
    "What if the dog sat in the snow",
    "Why not a dog in a forest?",
    "Can the dog jump in a forest?",
    "Are dogs in a forest?",
    "a dog in a forest, can you do that?",
]
CHANGES = [
    "make it jump",
    "make the dog jump in a forest",
    "please put the cat on a beach",
    "Put the cat on a beach",
    "turn the dog into a cat in a forest",
    "let's put the dog on a beach",
    "Please write a name on a wall",
    "hey, move the cat to a beach",
    "replace the background with a forest",
    "add a hat in a forest",
    "remove the collar in a forest",
    "change the place to a beach",
    "draw a dog in a forest",
    "Show me a dog in a forest",
    "Place the dog in a forest",
    "generate a dog in a forest",
    "give the dog a hat in a forest",
    "a dog, make it jump in a forest",
    "the same picture but in a forest",
    "don't show the dog in a forest",
    "imagine a dog in a forest",
    "Kindly turn the dog in a forest",
    "Zoom in on the dog in a forest",
    "Upscale the dog in a forest",
    "blur the background in a forest",
    "dog please be in a forest",
]
WISHES = [
    "I want the dog to jump in a forest",
    "I'd like a dog jumping in a forest",
    "i’d really love a dog in a forest",
    "We need a dog on a beach",
    "I'm looking for a dog in a forest",
    "I wish the dog was on a beach",
    "want a dog in a forest",
    "The dog should be jumping in a forest",
    "the dog must lie on a beach",
    "the dog needs to sit in the snow",
    "the dog will be on a beach",
    "it would be nice if the dog sat in the snow",
    "the dog to jump in a forest",
    "to jump in a forest",
    "if possible, a dog in a forest",
    "maybe a dog in a forest",
    "the dog is supposed to be in a forest",
    "Hello, I want a dog in a forest",
]


@pytest.mark.parametrize(
    "kind, texts", [("is a question", QUESTIONS), ("asks for a change", CHANGES), ("is a wish", WISHES)]
)
def test_no_descriptions(kind, texts):
    "Each is called what it is, and a description is proposed that the rule can read."
    for text in texts:
        said = refused(text, "describe the picture you want instead, such as '")
        if kind != "asks for a change" or not text.lower().startswith(("don't", "let's")):
            assert kind in said, said
        assert split_text(said.split("such as '")[1].removesuffix("'.")), said


@pytest.mark.parametrize(
    "text, better",
    [
        ("I want the dog to jump in a forest", "the dog jumping in a forest"),
        ("please put the cat on a beach", "the cat on a beach"),
        ("Could the dog be in a forest?", "the dog in a forest"),
        ("a dog should be sitting in the snow", "a dog sitting in the snow"),
        ("make it jump", "a brown dog jumping in a forest"),
        ("turn the dog into a cat in a forest", "a brown dog jumping in a forest"),
    ],
)
def test_a_wish_is_rewritten(text, better):
    refused(text, f"such as '{better}'.")


@pytest.mark.parametrize("text", ["I am standing on a beach", "we in a forest", "You sitting on a sofa"])
def test_persons(text):
    refused(text, "no model knows")


@pytest.mark.parametrize(
    "text, found",
    [
        ("a dog not jumping in a forest", "not jumping"),
        ("a dog without a collar in a forest", "without a collar"),
        ("a dog in a forest with no people", "no people"),
        ("a dog w/o a hat in a forest", "without a hat"),
        ("a dog in a forest instead of a beach", "instead of a beach"),
        ("a dog that isn't jumping in a forest", "isn't"),
        ("a dog never jumping in a forest", "never jumping"),
        ("nobody in a forest", "nobody"),
    ],
)
def test_negations(text, found):
    refused(text, found, "--negative-prompt")


LANGUAGES = {
    "German": [
        "Ein Hund springt im Wald",
        "ein brauner Hund in einem Wald",
        "Hund im Wald",
        "EIN HUND IM WALD",
        "mein Hund am Strand",
        "zwei Hunde am Strand",
        "Die Katze liegt auf dem Sofa",
        "der Hund steht unter einem Baum",
    ],
    "French": [
        "un chien qui saute dans une forêt",
        "Le chien est assis sur la plage",
        "une femme avec un chapeau dans les montagnes",
    ],
    "Spanish": ["un perro saltando en el bosque", "perro en la playa", "el gato está en el sofá"],
    "Italian": ["un gatto che dorme sul divano", "il cane che salta nella foresta"],
    "Portuguese": ["um cachorro pulando na floresta", "um gato em uma praia"],
    "Dutch": ["een hond springt in het bos", "een man met een hoed op het strand"],
    "Swedish": ["en hund som hoppar i skogen", "katten på soffan"],
    "Polish": ["pies skacze w lesie"],
    "Turkish": ["ormanda zıplayan bir köpek"],
    "Finnish": ["koira hyppää metsässä", "kissa istuu talossa"],
    "Cyrillic": ["собака прыгает в лесу", "Собака в лесу", "кіт на дивані"],
    "Chinese": ["一只狗在森林里跳", "狗，在森林里"],
    "Japanese": ["森の中でジャンプする犬", "イヌ"],
    "Korean": ["숲에서 뛰는 개"],
    "Arabic": ["كلب يقفز في غابة"],
    "Greek": ["ένας σκύλος στο δάσος"],
    "Hebrew": ["כלב ביער"],
    "Thai": ["สุนัขในป่า"],
    "Devanagari": ["जंगल में कुत्ता"],
    "Vietnamese": ["một con chó trong rừng"],
    "Indonesian": ["seekor anjing di hutan"],
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_other_languages(language):
    "The language is named, and how to give the parts by hand; given by hand they are taken."
    for text in LANGUAGES[language]:
        refused(text, language, "only English is read", "--object and --background", "object= and background=")
        assert str(split_text(text, "Waldi springt", "im Wald")) == "Waldi springt | im Wald"


@pytest.mark.parametrize("text", ["hond slaapt", "kuce u sumi", "anjo"])
def test_a_language_that_cannot_be_told(text):
    refused(text, "only English is read", "--object and --background")


@pytest.mark.parametrize(
    "text",
    [
        "A dog jumps. It is in a forest.",
        "a dog jumps. it is in a forest",
        "A dog jumps.It is in a forest",
        "A dog jumps; it is in a forest",
        "A dog! In a forest",
        "A dog jumps in the U.S. It is in a forest.",
    ],
)
def test_two_sentences(text):
    refused(text, "more than one sentence")


@pytest.mark.parametrize("text", ["", "  ", "...", "“”", "\n", "?!"])
def test_empty(text):
    refused(text, "is empty", "describe the picture")


@pytest.mark.parametrize("text", [None, 5, ["a dog in a forest"], b"a dog in a forest"])
def test_no_text(text):
    refused(text, repr(text), "in words")
    if text is not None:
        refused("a dog in a forest", repr(text), object=text)


def test_parts_by_hand():
    "Taken as they are, without quotation marks; an empty one is as if it were not given."
    assert str(split_text("Ein Hund", " “Waldi springt” ", "im  Wald")) == "Waldi springt | im Wald"
    assert str(split_text("a dog jumping in a forest", background="on a lawn")) == "a dog jumping | on a lawn"
    assert str(split_text("a dog jumping in a forest", "", " ")) == PLAIN


def test_plain_words_leaves_plain_words():
    "What was fine before stays the same text, full stop included."
    for text in (
        "A brown dog is jumping in a forest.",
        "a small, spotted dog sitting in a meadow",
        "a dog with * * * on a beach",
        "a 4K photo of a dog, 50 mm, f/1.8, in a forest",
        "a dog - my own - in Trier's old town",
    ):
        assert plain_words(text) == text
