def add_eval_flags(parser):
    g = parser.add_argument_group("scores")
    g.add_argument("--protocol", choices=["strict", "official"], default="strict")
    g.add_argument("--w-flow", type=float, default=None)
    g.add_argument("--w-frame", type=float, default=None)

def quick_auc(net, ready, picked, every, args, r):
    return {}

def evaluate(args, ready, checkpoint, r):
    pass
