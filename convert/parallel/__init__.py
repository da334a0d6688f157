"""One conversion by many processes, on one machine or several: `torchrun --nproc-per-node 8 -m dlr_lock convert ...`.

Every process runs the same pipeline, from `convert_model` to the end, and holds a `Ranks` (ranks.py) in its `Context`:
what it is, and the few exchanges that there are. A process alone has the plain `Ranks`, whose exchanges give back what
they got; so the pipeline has one form. What the processes are, their addresses and what becomes of the others when one
dies is torch.distributed's and its launcher's. The output, and with it what is kept of finished modules, lies on a file
system that all of them see.

What is done once. The first process has the output to itself, makes the calibration text, measures, assembles, writes,
and speaks; the others get what it found (`Ranks.agreed`), or its error. So a decision taken from a measurement is the
same everywhere.

Two ways, by `--across`:

independent: the modules are dealt out by FLOPs (balance.py), and the text by batches: each process leads its part up
    to all modules, and what is found at a module is sent to the process that fits it
    (convert/activations/dealt.py). That has it on the whole text then, fits it with the seed that it would have had
    anyway, and keeps it where one process keeps it, too. At the end all of them read the others' there. Nothing is
    exchanged while modules are fitted, and the chains have the bits of one process with as many threads.

sequential: the sequences of the text are dealt out (share.py). A process leads its own through the layers, and holds
    their activations and no others. All draw the same batches, in the order of one process, and each takes the rows
    that it has. A step of a fit sums gradients once, together with the loss; each process then orthogonalises its part
    of the blocks, for which Muon takes more FLOPs than the gradients where the model is wide, and all exchange what
    came of it, once a matrix. So weights and losses are the same bits in all processes, and so are the decisions that
    follow from them. They are not the bits of one process: sums of gradients have another order, and products over
    other batches of sequences round otherwise. Small samples of activations (of typical sizes, for the preconditioner,
    for the attack's linear maps) are collected whole, in the order of one process. Of a mixture the experts are dealt
    out, by FLOPs, too: each process gets all tokens of its own (`Rows.sent`), fits and attacks them alone, and all get
    all chains (convert/experts/fit.py).

The end-to-end phase spreads the sequences of each step in the same way, whatever `--across` says.

What is kept is the same in all of these, so that an interrupted conversion goes on with any number of processes.

Ends. Whoever fails first says why, in one line; the others find the connection closed, or are told to end by the
launcher, and are silent (`may_tell` in ranks.py, `dlr_lock/exits.py`).
"""
