"""`equalize predict`: the class of each pixel as index masks, and as overlays to look at.

DIR/masks/NAME.png      class indices 0 .. K - 1, 8 bits gray, 16 where K > 256; at the picture's own size, upright
DIR/overlays/NAME.jpg   the picture with the colors of its classes
DIR/legend.png          the colors and names of the classes that occur
DIR/predictions.json    what `equalize predict --json` prints

predict.py   the flow
files.py     what is written, and a record of it
"""
