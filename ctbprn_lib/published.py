"""The table of the original report: ten trials, each with its scores and its hyperparameters, as printed there."""

import io

import pandas as pd

from ctbprn_lib.train import Hyperparameters

TABLE: pd.DataFrame = pd.read_csv(
    io.StringIO("""trial,val_accuracy,ce_loss,lr,d,rank,temperature,batch_size,seq_len
0,0.7500,0.7030,0.00056,32,4,1.80,16,32
1,0.6250,0.6470,0.00023,96,16,0.71,32,32
2,0.7813,0.6495,0.00153,64,16,1.71,32,128
3,0.6250,0.6715,0.00012,32,16,0.78,8,128
4,0.6875,0.6556,0.00015,96,16,1.04,16,128
5,0.6563,0.6520,0.00596,64,8,1.71,32,64
6,0.6875,0.6975,0.00318,64,4,1.47,32,128
7,0.6875,0.7184,0.00126,64,8,1.37,8,64
8,0.7813,0.6498,0.00149,64,16,2.00,32,128
9,0.6563,0.6612,0.00050,64,16,1.13,32,128
""")
)


def hyperparameters(number: int) -> Hyperparameters:
    """The hyperparameters of the published trial with this number (0 to 9).  Raises KeyError for another number."""
    rows = TABLE.set_index("trial").drop(columns=["val_accuracy", "ce_loss"]).to_dict("index")
    return Hyperparameters(**rows[number])
