"""Short texts on which tokenizers part ways, beside those of llama.cpp's own vocabulary tests."""

from __future__ import annotations

LLAMA_CPP = (
    "ied 4 ½ months", "Äpfel", "", " ", "  ", "   ", "\t", "\n", "\n\n", "\n\n\n", "\t\n",
    "Hello world", " Hello World!", "Hello, world!", " this is 🦙.cpp", "w048 7tuijk dsdfhu",
    "нещо на Български", "កាន់តែពិសេសអាចខលចេញ",
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ (only emoji that has its own token)",
    "  Hello", "    Hello\n    Hello", " (", "\n =", "' era", "!!!!!!", "Cửa Việt", " discards",
    "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n3 33 333 3333 3.3 3..3 3...3 ------======= "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL",
)  # fmt: skip
OURS = (
    # Digits: in threes from the left, one by one, and other scripts' digits
    *("3" * n for n in range(1, 10)), "2024年12月25日", "1,234,567.89", "x86_64 v3.1", "٣٤٥ ⅷ ½²",
    # CJK and kana, alone, mixed, and next to Latin
    "深度求索", "中文English混排abc。", "ひらがなカタカナ漢字ー", "한국어 문장입니다.",
    "「你好」，世界！",
    "　全角　空格", "㐀𠀀𪛖", "ﾊﾝｶｸ Ｆｕｌｌ",
    # Spaces and line ends
    "a  b   c    d", "trailing   ", "  \n  x", "a\r\nb\r\n\r\nc", "a\n\n\n\nb \n",
    "\u00a0x\u2003y\u200bz",
    "tab\t\tin", "\x00\x7f\x85", "\ufeffBOM",
    # Accents composed and not, marks on their own, scripts with marks
    "café", "cafe\u0301", "\u0301x", "A\u030angstro\u0308m Å \u212b", "हिन्दी में", "สวัสดีครับ",
    "שָׁלוֹם", "\u1100\u1161\u11a8",
    # Emoji
    "👨‍👩‍👧‍👦🏳️‍🌈", "❤️❤", "🇨🇳🇩🇪",
    # Code and signs
    "def f(x):\n    return {'a': x[0]**2}  # ok", "if(a&&b||!c){i++;}",
    "<div class=\"x\">&amp;</div>",
    "https://example.org/a_b?c=d&e=%20#f", "$\\frac{1}{2}$ ≠ ∑ →", "snake_case camelCase ALLCAPS",
    "don't DON'T it's 'tis", "#!/bin/sh -e\n", "::\n...\n---\n",
    # What spells a special token
    "<｜begin▁of▁sentence｜>a<｜User｜>b<｜end▁of▁sentence｜>", "<think>\nhm\n</think>\n\n",
    "<｜tool▁calls▁begin｜>", "<|im_start|>user\nx<|im_end|>\n<|endoftext|>",
    "<｜ User｜>", "<|User|>",
)  # fmt: skip
TEXTS = (*LLAMA_CPP, *OURS)
