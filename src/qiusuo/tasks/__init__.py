"""Problems whose answers can be checked: what reasoning is trained on and measured with.

    what a task is    task.py (problems, verdicts, the split by canonical problem)
    by name           registry.py (ours, of packages, a user's file)
    numbers           parity.py, chains.py, sums.py, arithmetic.py,
                      countdown.py with expression.py (a parser: nothing is evaluated)
    stories           word_problems.py, word_stories.py (English and Chinese)
    verse             verse.py, verse_rules.py, verse_readings.py, verse_guards.py,
                      verse_novelty.py (a reward for being new)
    code              programs.py, program_steps.py, sandbox.py, sandbox_launcher.py (a model's
                      program, in a cage)
    reasoning-gym     gym.py, gym_games.py, gym_client.py, gym_server.py (in the cage too)

Verifiers pay 0 or 1, take any text whatever, and never evaluate what a model wrote: programs
run in the cage alone. Every refusal is a `TaskError`. Nothing here imports another room.
"""
