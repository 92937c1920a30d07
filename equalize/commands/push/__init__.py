"""A directory that equalize wrote -> a repository on the Hugging Face Hub, with a model card.

files.py            which files go, without the paths of the user's machine
card.py             what the directory says about itself, as the model card, by card_template.md
hub_errors.py       failures of the Hub's client as ours
push.py             `push`
"""
