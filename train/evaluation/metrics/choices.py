"""Multiple choice: finds the option that an answer names, in English or Chinese, and counts right answers."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from train.evaluation.metrics.text import final_answer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Pieces of the rules below. No word, sharp or flat may follow a letter: not "Bb", "A#", "I'm".
_END = "(?![^\\W\u3400-\u9fff]|[#\u266f\u266d]|['\u2019]\\w)"
# A lower-case letter counts only at the end of the answer: elsewhere "a" is an article.
_LETTER = rf"((?-i:[A-Z]){_END}|(?-i:[a-z])(?=[\s*_\"').\]}}$\u3002]*\Z))"
_BEFORE = "(?<![A-Za-z0-9_'\u2019#-])"  # a letter begins here
_OPEN = "[\\s:=*_\"'\u201c\u2018(\\[$\\\\{<\u3010-]*"  # allowed before a letter: bold, quotes, brackets
_CLOSE = "[*_\"'\u201d\u2019)\\]}>\u3011]*"
# Nothing follows that the letter belongs to: not "A minor", "A dog".
_ALONE = rf"(?={_CLOSE}\s*(?:$|[.,;:!?\n\u3002(]|(?:because|since|as|which|and|or|but)\b))"
_NOUN = r"(?:option|choice|letter|answer)"
_LIKELY = r"(?:\s+(?:most\s+likely|likely|probably|clearly|definitely|indeed|therefore|thus|simply|actually))"
_IS = rf"(?:\s*(?:['\u2019]s\b|\b(?:is|was|are|would|should|must|might|may|could|will|has\s+to|be)\b){_LIKELY}*)"
_WORD_END = r"(?=\s*(?:$|[.,;:!?\n\u3002]|(?:because|since|as|so|but|and|while|here|in|for|too)\b))"
_HERE = rf"{_BEFORE}\(?{_LETTER}"  # a letter that begins a statement
_MORE = rf"(?:{_CLOSE}\s*(?:,|and|or|&|\s)\s*\(?[A-Z]\b)*{_CLOSE}"
_OF_THE_KIND = r"(?:\s+(?:the|my|most|best|only|likely|accurate|appropriate|final|one|that))*"
_CHOOSE = (
    r"\b(?:choos(?:e|ing)|chose|select(?:ed|ing)?|pick(?:ed|ing)?|(?:go(?:ing)?|went)\s+with|opt\s+for"
    r"|say|think|believe|guess)"
)
_SHOULD = "\\s*(?:应该|应当|应|就|可能|大概|最可能)?\\s*"

_SAID_OF_OPTIONS = {
    "correct",
    "right",
    "true",
    "yes",
    "best",
    "wrong",
    "incorrect",
    "false",
    "no",
    "正确",
    "对",
    "错误",
    "错",
}
_REJECTED = [  # options that the answer calls wrong; they are ignored
    rf"{_HERE}{_MORE}\.?\s*(?:\b(?:is|are|was)\s+(?:(?:both|all)\s+)?|[:=-]\s*)(?:wrong|incorrect|false|no){_WORD_END}",
    rf"{_HERE}{_MORE}\s*\b(?:is|are|was)\s+not\s+(?:(?:the|a)\s+)?(?:\w+\s+)?(?:correct|right|true|{_NOUN})\b",
    rf"\b(?:wrong|incorrect)\s+{_NOUN}{_IS}{_OPEN}{_LETTER}",
    rf"\b(?:not|isn['\u2019]t|never|cannot\s+be|rule\s+out|eliminate)\s+(?:{_NOUN}\s+)?{_OPEN}{_LETTER}{_ALONE}",
    rf"(?:不是|不选|不应选|并非|排除)\s*(?:选项)?{_OPEN}{_LETTER}",
    rf"{_HERE}{_CLOSE}\s*(?:选项|项)?\s*[:是为]?\s*(?:不正确|不对|错误|错)",
]
_RULES: dict[str, list[str]] = {  # the first rule that finds an option decides
    "final": [
        rf"\bfinal\s+{_NOUN}{_IS}*{_OPEN}(?:{_NOUN}\s+)?{_OPEN}{_LETTER}",
        rf"最终(?:答案|选择)\s*(?:应该|应)?[是为选]?{_OPEN}{_LETTER}",
    ],
    "stated": [
        rf"\bans(?:wer)?\b\.?(?:\s+{_NOUN})?(?:\s+to\s+(?:the|this)\s+question)?{_IS}*"
        rf"{_OPEN}(?:{_NOUN}\s+)?{_OPEN}{_LETTER}",
        rf"\b(?:option|choice)(?:{_IS}+|\s*:){_OPEN}(?:{_NOUN}\s+)?{_OPEN}{_LETTER}",
        rf"\\boxed\s*\{{\s*(?:\\text\s*\{{)?\s*\(?{_LETTER}",
        rf"答案(?:选项)?{_SHOULD}(?:是|为|选择|选)?\s*(?:选项)?[\u3011\]]*{_OPEN}{_LETTER}",
        rf"(?:正确|最佳|合适|恰当|符合题意)的?(?:选项|选择)?{_SHOULD}[是为:]{_OPEN}{_LETTER}",
    ],
    "judged": [
        rf"{_HERE}{_CLOSE}\.?(?!\s*are\b){_IS}+{_OF_THE_KIND}\s+(?:correct|right|true|best|answer|choice|option)\b",
        rf"{_HERE}{_CLOSE}\.?\s*[:=-]\s*(?:correct|right|true|yes)\b",
        rf"{_HERE}{_CLOSE}\s*(?:选项|项)?\s*[:是为]?\s*(?:最?正确|符合题意|对(?=的|[,.;!\s\u3002]|$))",
    ],
    "chosen": [
        rf"{_CHOOSE}\s+(?:{_NOUN}\s+)?{_OPEN}{_LETTER}{_ALONE}",
        rf"选(?:择|定)?{_OPEN}{_LETTER}",
    ],
    "concluded": [
        rf"\b(?:it|this|that)(?!\s+(?:could|might|may)\b){_IS}+\s+(?:{_NOUN}\s+)?{_OPEN}{_LETTER}{_ALONE}",
        rf"\b(?:so|therefore|thus|hence|but)\b[,:]?\s+(?:{_NOUN}\s+)?{_OPEN}{_LETTER}{_ALONE}",
        rf"(?:而是|应该是|应当是|应是|应为|就是|所以是|因此是){_OPEN}{_LETTER}",
    ],
    "labelled": [
        r"^[\s#*_(\[\"'>-]*((?-i:[A-Z])(?=[*_\"']*[,、])|[A-Z](?=[*_\"']*(?:[).:\]]|\s*$)))",
    ],
    "named": [
        rf"\b(?:option|choice)\s+{_OPEN}{_LETTER}",
        rf"选项\s*{_OPEN}{_LETTER}",
        rf"{_BEFORE}{_LETTER}\s*(?:选项|项)",
    ],
}
_ANOTHER = rf"{_CLOSE}\s*(?:(?:or|and|&|/)\s*{_OPEN}{_LETTER}{_ALONE}|[和或与]\s*{_OPEN}{_LETTER})"  # "B or C"


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.MULTILINE)


_REJECTIONS = [_compiled(pattern) for pattern in _REJECTED]
_PATTERNS = {name: [_compiled(pattern) for pattern in patterns] for name, patterns in _RULES.items()}
_ANOTHER_PATTERN = _compiled(_ANOTHER)
_EDGES = " \t\r\n.,;:!?\"'`\u201c\u201d\u2018\u2019*_()[]"


class ChoiceReading(NamedTuple):
    """Option that an answer names; `letter` is None if it names none or several."""

    letter: str | None
    status: Literal["answered", "unanswered", "ambiguous"]


def read_choice(text: str, choices: Sequence[str]) -> ChoiceReading:
    """Finds the option that an answer names. The first of these rules that finds an option decides:

    1. the whole answer is the text of an option, of more than one character;
    2. the whole answer is letters: `B`, `(b).`, `**B**`. They are letters of options even if an option has that text,
       as in questions about chords, since the prompt asks for letters;
    3. the patterns of `_RULES`, in English and Chinese, in this order:
       final      `final answer: B`, `最终答案：B`
       stated     `the answer is C`, `Answer: (C)`, `\\boxed{C}`, `the correct option is C`, `答案是C`
       judged     `C is correct`, `A: wrong. C: right`, `C是正确的`
       chosen     `I choose C`, `故选C`
       concluded  `It is C`, `so C`, `应该是C`
       labelled   a letter that labels a line: `B. text`, `B) text`, `(B) text`, `B, because ...`
       named      `option C`, `选项C`
    4. texts of options as whole words in the answer, longer ones first (`car horn` does not name `car`).

    Options that the answer rejects (`A is wrong`, `not A`, `A错误`) are ignored by rule 3. If a rule finds several
    options, or another option's text follows the letter, the answer is ambiguous.
    """
    answer = unicodedata.normalize("NFKC", final_answer(text)).strip()
    letters = LETTERS[: len(choices)]
    texts = [_fold_choice(choice) for choice in choices]
    whole = _fold_choice(answer)
    if len(whole) > 1 and whole in texts:
        return _decide({letters[texts.index(whole)]})
    words = [word.upper() for word in re.findall(r"[^\W_]+", answer) if word.upper() not in ("AND", "OR")]
    if words and all(len(word) == 1 and word in letters for word in words):
        is_label = _fold_choice(whole[1:]) == texts[letters.index(words[0])]  # `C. D`, if the text of option C is D
        return _decide({words[0]} if is_label else set(words))
    judging = not _SAID_OF_OPTIONS.intersection(texts)  # else "B: wrong" is option B with its text
    if judging:
        for pattern in _REJECTIONS:
            answer = pattern.sub(" ", answer)
    for name, patterns in _PATTERNS.items():
        if name == "judged" and not judging:
            continue
        matches = (match for pattern in patterns for match in pattern.finditer(answer))
        found = {reading for match in matches for reading in _read_letter(match, letters, texts)}
        if found:
            return _decide(found)
    return _decide({letters[texts.index(choice)] for choice in _texts_within(whole, texts)})


def _decide(found: set[str]) -> ChoiceReading:
    if len(found) == 1:
        return ChoiceReading(found.pop(), "answered")
    return ChoiceReading(None, "ambiguous" if found else "unanswered")


def _read_letter(match: re.Match[str], letters: str, texts: Sequence[str]) -> set[str]:
    """Returns the option of a matched letter, and another option if its text or letter follows.

    A whole text comes first: the A of "A dog" may be an article.
    """
    line = match.string[match.start(1) :].split("\n", 1)[0]
    letter, rest = match[1].upper(), _fold_choice(line[1:])
    if rest and _fold_choice(line) in texts:
        return {letters[texts.index(_fold_choice(line))]}
    if letter not in letters:
        return set()
    own = texts[letters.index(letter)]
    if another := _ANOTHER_PATTERN.match(line, 1):
        return {letter, (another[1] or another[2]).upper()}
    return {letter, letters[texts.index(rest)]} if rest and rest in texts and rest != own else {letter}


def _texts_within(answer: str, texts: Sequence[str]) -> list[str]:
    found = []
    for text in sorted(set(texts) - {""}, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(text)}(?!\w)"
        if re.search(pattern, answer):
            found.append(text)
            answer = re.sub(pattern, "\0", answer)
    return found


def _fold_choice(text: str) -> str:
    """Folds case and white space; strips quotes, brackets and punctuation at both ends. Symbols stay (A# is not A)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGES)


@dataclass(frozen=True)
class ChoiceScore:
    """Counts of multiple-choice answers. Unanswered and ambiguous ones are wrong."""

    correct: int = 0
    total: int = 0
    unanswered: int = 0
    ambiguous: int = 0

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.total if self.total else None


def score_choices(predictions: Iterable[str], choices: Iterable[Sequence[str]], answers: Iterable[str]) -> ChoiceScore:
    """Counts right answers. answers: letters. Options with equal text are the same option."""
    correct = 0
    statuses = []
    for prediction, options, answer in zip(predictions, choices, answers, strict=True):
        letter, status = read_choice(prediction, options)
        statuses.append(status)
        if letter is not None:
            chosen, true = (_fold_choice(options[LETTERS.index(x)]) for x in (letter, answer))
            correct += letter == answer or (chosen == true != "")
    return ChoiceScore(correct, len(statuses), statuses.count("unanswered"), statuses.count("ambiguous"))
