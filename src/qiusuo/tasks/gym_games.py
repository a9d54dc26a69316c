"""Which games of reasoning-gym 0.1.25 may be a reward, and why the others may not.

Found by trying: twelve items of each game, its own answer, two dozen bits of garbage ("0", "True",
"[]"), and its own answer among other words; then three items of each difficulty. A game is here if
it has a right answer for each item, pays it in full, and pays nothing else in full more often than
chance. What is equal to the answer its authors decide: some read numbers, so that -5. is -5.
"""

from __future__ import annotations

import re

GAMES = tuple(
    """
    ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf
    binary_alternation binary_matrix bitwise_arithmetic caesar_cipher calendar_arithmetic chain_sum
    circuit_logic codeio color_cube_rotation complex_arithmetic count_bits count_primes countdown
    course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery
    family_relationships figlet_font futoshiki game_of_life gcd group_anagrams isomorphic_strings
    jugs knight_swap largest_island lcm leg_counting letter_counting list_functions mahjong_puzzle
    manipulate_matrix maze mini_sudoku modulo_grid n_queens needle_haystack number_filtering
    number_format number_sequence number_sorting palindrome_generation palindrome_partitioning
    path_star polynomial_equations pool_matrix power_function prime_factorization products puzzle24
    ransom_note rearc rectangle_count rotate_matrix rotten_oranges self_reference
    sentence_reordering shortest_path simple_equations simple_geometry spell_backward spiral_matrix
    string_insertion string_manipulation string_splitting string_synthesis sudoku syllogism
    tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting
    zebra_puzzles
    """.split()
)

CODE = "its scorer runs the answer as code, which could then pay itself"
AMONG = "it pays in full for the answer among other text"
UNSOLVED = "its items come without a right answer"
REFUSED = {
    "boxnet": UNSOLVED,
    "coin_flip": "it pays in full for the answer 0",
    "composite": "it is a mixture of other games: mix tasks instead",
    "fraction_simplification": AMONG,
    "game_of_life_halting": "it pays in full for any text",
    "graph_color": UNSOLVED,
    "gsm_symbolic": AMONG,
    "intermediate_integration": CODE,
    "kakurasu": AMONG,
    "knights_knaves": AMONG,
    "letter_jumble": AMONG,
    "polynomial_multiplication": CODE,
    "propositional_logic": UNSOLVED,
    "quantum_lock": AMONG,
    "rubiks_cube": UNSOLVED,
    "rush_hour": UNSOLVED,
    "simple_integration": CODE,
    "sokoban": AMONG,
    "survo": AMONG,
    "time_intervals": AMONG,
}

# These scorers run the answer as code too, but their answers are plain: what no right answer has
# does not reach them. Powers would let a few characters compute for ever.
SUM = re.compile(r"(?!.*\*\s*\*)[-+*/() 0-9]{1,100}")
PLAIN = {
    "binary_matrix": re.compile(r"[0-9 \n]+"),
    "countdown": SUM,
    "n_queens": re.compile(r"[Q_ \n]+"),
    "puzzle24": SUM,
    "spiral_matrix": re.compile(r"[0-9 ]+"),
    "string_insertion": re.compile(r"[A-E]+"),
}
