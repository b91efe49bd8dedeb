"""The settings of ../Base-COCO.yaml: COCO, 1x schedule, students from torchvision's ImageNet weights."""

from detectron2.model_zoo import get_config

# Of RGB images, as those weights expect.
pixel_mean = [123.675, 116.280, 103.530]
pixel_std = [58.395, 57.120, 57.375]

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"

optimizer = get_config("common/optim.py").SGD
optimizer.nesterov = True

lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x

train = get_config("common/train.py").train
# Arguments of mgd_det.engine.MatchingUpdate.
train.matching = dict(num_batches=1000, periods=[5000, 31000], milestones=[20000])
