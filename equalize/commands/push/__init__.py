"""A directory that equalize wrote -> a repository on the Hugging Face Hub, with a model card.

facts.py      what the directory itself says: base, plan, identity
results.py    what training and evaluation left there
loading.py    how its own library loads it
text.py       these facts as Markdown
card.py       the card: metadata, text, a user's own README kept
outgoing.py   which files go, and which never do
client.py     the Hub's client, its failures as ours
hub.py        `push`
report.py     what a push did, for people
"""
