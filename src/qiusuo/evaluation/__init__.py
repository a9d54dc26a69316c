"""How well a model does what it was trained for: tasks with verifiers, and texts it should expect.

    how a problem is put to a model, and its words are read    asking.py
    who answers: a model here, or a server                     answers.py, server_answers.py
    the measurement, by task and difficulty                    evaluate.py
    numbers with intervals                                     statistics.py
    bits per character of texts                                bits.py
    `qiusuo eval`: what is typed, done and shown               plan.py, command.py, table.py

Stages of training ask through `Asker` too, so what is trained is what is measured and served.
"""
