"""PivotVisionModel: one class for every backbone, whose output is the features that enter an MLLM.

This file is copied into every published encoder and runs under transformers 4.57 and 5. It imports only torch,
Pillow, transformers, safetensors (which transformers depends on) and its own configuration.
"""

import json
import re
import shutil
from copy import deepcopy
from importlib import import_module
from pathlib import Path

import torch
import transformers
from PIL import ExifTags, Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_torchvision_available

from .configuration_pivot import (
    BACKBONES,
    LAST,
    MERGED,
    MOST,
    PivotVisionConfig,
    backbone_of,
    native_config,
)
from .native_resolution import LAYOUTS, merge_side, to_maps

try:  # transformers 5 collects hidden states with hooks, which it installs at the first call
    from transformers.utils.output_capturing import maybe_install_capturing_hooks
except ImportError:  # transformers 4 has no such hooks
    maybe_install_capturing_hooks = None

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# As in pivot_hub.data.image, which this file cannot import. No format here starts another program, as EPS would.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
AUTO_MAP = {
    "AutoConfig": "configuration_pivot.PivotVisionConfig",
    "AutoModel": "modeling_pivot.PivotVisionModel",
    "AutoBackbone": "modeling_pivot.PivotVisionBackbone",
}


class PivotVisionModel(PreTrainedModel):
    """Vision encoder that returns the patch tokens of its feature layer, without prefix tokens.

    Example:
        >>> encoder = PivotVisionModel.from_pretrained("google/siglip2-base-patch16-512")
        >>> encoder.forward_features([Image.open("cat.jpg")]).last_hidden_state.shape  # (B, H*W, D)
        torch.Size([1, 1024, 768])
    """

    config_class = PivotVisionConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config, backbone=None):
        if backbone is not None:
            config._attn_implementation = backbone.config._attn_implementation
        super().__init__(config)
        if backbone is None:
            attention = {"attn_implementation": config._attn_implementation}
            model_class = native_class(config.backbone_config)
            from_config = model_class.from_config if model_class is AutoModel else model_class._from_config
            self.backbone = from_config(config.backbone_config, **attention)
        else:
            self.backbone = backbone
        self._processor = self._processor_source = None
        if maybe_install_capturing_hooks is not None:
            # If the first call installed them inside torch.compile, the graph would break.
            maybe_install_capturing_hooks(self.backbone)
        if config.patch_size is None:
            self._measure_sizes()
        if backbone is None:
            self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, config=None, feature_layer=None, out_indices=None, **kwargs
    ):
        """Load a native repository: one that this package wrote, or an original one (then stage is `base`).

        Args:
            pretrained_model_name_or_path: Folder or Hub name. Of a two-tower model, the vision tower is loaded.
            config: PivotVisionConfig that replaces the repository's.
            feature_layer: Hidden state to return, if it is not the repository's; `last_hidden_state` for the native
                class's own output, `merged` for the tokens that a tower of native resolution merges from patches.
            out_indices: Hidden states that a `PivotVisionBackbone` returns as maps.
            **kwargs: Options of transformers' own `from_pretrained`: dtype, device_map, attn_implementation, ...

        Raises:
            ValueError: The repository is not a complete encoder in safetensors. The message says what it is, and the
                remedy.
            OSError: The repository does not exist.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(name, kwargs.get("subfolder", ""))
        if folder.is_dir():
            _refuse_folder(folder)
        # The Auto classes pass on remote-code settings, but the backbone is always a native class.
        for setting in ("trust_remote_code", "code_revision", "adapter_kwargs"):
            kwargs.pop(setting, None)
        return_info = kwargs.pop("output_loading_info", False)
        hub_options = {
            k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if k in kwargs
        }
        refuse_config(PretrainedConfig.get_config_dict(name, **hub_options)[0], name)
        repository_config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub_options)
        pivot = vars(repository_config).pop("pivot", None)
        vars(repository_config).pop("auto_map", None)
        native = native_config(repository_config)
        if not isinstance(config, PivotVisionConfig):
            config = PivotVisionConfig(native, pivot)
        if feature_layer is not None:
            config = PivotVisionConfig(config.backbone_config, {**config.pivot, "feature_layer": feature_layer})
        if out_indices is not None:
            config.out_indices = list(out_indices)
        try:
            backbone, info = native_class(native).from_pretrained(
                name,
                *args,
                config=native,
                output_loading_info=True,
                use_safetensors=True,
                **({"trust_remote_code": False} if native_class(native) is AutoModel else {}),
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(f"{name}: its weights are cut off or damaged ({error}); download it again.") from error
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise ValueError(
                f"{name}: the weights do not have the sizes of config.json; give the config that belongs to them."
            ) from error
        _require_complete(backbone, info, name)
        config.backbone_config = backbone.config
        model = cls(config, backbone).eval()
        model.name_or_path = name
        token = hub_options.pop("token", None)
        model._processor_source = (name, hub_options)
        if token is not None:  # read the image processor now, so that the model does not store the token
            model._processor = read_image_processor(name, native, token=token, **hub_options)
        return (model, info) if return_info else model

    @classmethod
    def from_mllm(cls, mllm, pivot=None, image_processor=None):
        """Copy the encoder out of a LLaVA-style model, which is not changed.

        Args:
            mllm: A LlavaForConditionalGeneration.
            pivot: Metadata of its training for the config; feature_layer is read from the model.
            image_processor: Image processor of the MLLM, for `forward_features` and `save_pretrained`.
        """
        backbone = deepcopy(mllm.model.vision_tower)
        metadata = {"feature_layer": mllm.config.vision_feature_layer, **(pivot or {})}
        model = cls(PivotVisionConfig(backbone.config, metadata), backbone).eval()
        model._processor = image_processor
        return model

    def save_pretrained(self, save_directory, **kwargs):
        """Write a repository that all three loading paths open: native weights and config, processor, remote code.

        Args:
            save_directory: Folder to write to; it is created if it does not exist.
            **kwargs: Options of transformers' own `save_pretrained`.

        Raises:
            ValueError: The options ask for a pickle, or for a push to the Hub, which would upload an incomplete
                repository; or the repository that the model was loaded from has no image processor. In each case
                nothing is written.
        """
        folder = Path(save_directory)
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained writes a folder only; call push_to_hub(repo_id) of the model after it.")
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("weights are written as safetensors, never as a pickle; leave safe_serialization out.")
        if kwargs.get("state_dict") is not None:  # transformers' Trainer passes the keys of this class
            kwargs["state_dict"] = {k.removeprefix("backbone."): v for k, v in kwargs["state_dict"].items()}
        has_processor = self._processor is not None or self._processor_source is not None
        processor = (
            self.image_processor if has_processor else None
        )  # may fail, so it is read before anything is written
        self.backbone.save_pretrained(folder, **{"max_shard_size": "100GB", **kwargs})
        if prefix := backbone_of(self.backbone.config).key_prefix:
            _add_key_prefix(folder, prefix)
        config = json.loads((folder / "config.json").read_text())
        indices = {} if self.config.out_indices is None else {"out_indices": list(self.config.out_indices)}
        if config["model_type"] == "pixtral" and "rope_parameters" in config:
            # transformers 5.0 refuses the form that later releases write; all read that of the Hub's originals.
            config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config |= {"auto_map": AUTO_MAP, "pivot": self.config.pivot | indices}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if processor is not None:
            processor.save_pretrained(folder)
        for name in ("configuration_pivot.py", "modeling_pivot.py", "native_resolution.py"):
            shutil.copyfile(Path(__file__).with_name(name), folder / name)

    def __reduce__(self):
        """Pickle without transformers' hooks, which are local functions; they are installed again afterwards."""
        backbone = deepcopy(self.backbone)
        for module in backbone.modules():
            for key, hook in list(module._forward_hooks.items()):
                if "output_capturing_hook" in getattr(hook, "__qualname__", ""):
                    del module._forward_hooks[key]
            if hasattr(module, "_output_capturing_hooks_installed"):
                module._output_capturing_hooks_installed = False
        return _unpickle, (type(self), {**vars(self), "_modules": {**self._modules, "backbone": backbone}})

    @property
    def image_processor(self):
        """The repository's own image processor.

        Raises:
            ValueError: The repository has none; the message names the class that its images need.
        """
        if self._processor is None:
            if self._processor_source is None:
                needed = backbone_of(self.config.backbone_config).image_processor
                raise ValueError(f"this encoder has no image processor; set its image_processor to a {needed}.")
            name, hub_options = self._processor_source
            self._processor = read_image_processor(name, self.config.backbone_config, **hub_options)
        return self._processor

    @image_processor.setter
    def image_processor(self, processor):
        self._processor = processor

    def forward(
        self,
        pixel_values,
        output_hidden_states=None,
        output_attentions=None,
        interpolate_pos_encoding=False,
        return_dict=None,
        **shapes,
    ):
        """Encode images.

        Args:
            pixel_values: Images (B, 3, height, width) from the repository's image processor; for a tower of native
                resolution, whatever its image processor returns under this name.
            output_hidden_states: Whether to return every hidden state of the backbone too.
            output_attentions: Whether to return every attention of the backbone too.
            interpolate_pos_encoding: Whether to accept an image size that the encoder was not trained on.
            return_dict: False to return a tuple.
            **shapes: For a tower of native resolution, the image processor's other outputs, such as `image_grid_thw`.

        Returns:
            last_hidden_state (B, H*W, D): patch tokens at the feature layer; for a tower of native resolution, a tuple
            of one map (H, W, D) for each image. pooler_output (B, D): their mean; hidden_states and attentions, if
            requested.

        Raises:
            ValueError: The patch size does not divide the image size, the size needs `interpolate_pos_encoding`, or
                the shapes of the images are missing.
        """
        if self.config.image_size is None:
            outputs = self._run_native_resolution(pixel_values, shapes, output_attentions, output_hidden_states)
            tokens = tuple(self.maps(outputs, self.config.pivot["feature_layer"], shapes))
            pooled = torch.stack([features.mean(dim=(0, 1)) for features in tokens])
        else:
            outputs = self._run_backbone(
                pixel_values, interpolate_pos_encoding, output_attentions, output_hidden_states
            )
            tokens = self._patch_tokens(select_features(outputs, self.config.pivot["feature_layer"]))
            pooled = tokens.mean(dim=1)
        features = BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=pooled,
            hidden_states=tuple(outputs.hidden_states) if output_hidden_states else None,
            attentions=outputs.attentions if output_attentions else None,
        )
        return features if return_dict is not False else features.to_tuple()

    def forward_features(self, images, **kwargs):
        """Prepare images with the repository's own image processor and encode them.

        Args:
            images: An image or a list of them: PIL images of any mode, paths, and arrays or tensors (height, width),
                (height, width, channels) or (channels, height, width) of integers from 0 to 255 or floats from 0 to 1.
                Images are turned upright as their EXIF says, and transparent pixels become white.
            **kwargs: Options of `forward`.

        Returns:
            The output of `forward` for the images in order: `last_hidden_state` is a tensor (B, H*W, D), or, for a
            tower of native resolution, a tuple of one map (H, W, D) for each image.

        Raises:
            ValueError: An image cannot be decoded, or an array has another shape or range.
        """
        return self(**self.prepare([_as_rgb(image) for image in _listed(images)]), **kwargs)

    def prepare(self, images):
        """Prepare RGB images with the repository's image processor, for `forward`, on the encoder's device."""
        inputs = prepare_images(self.image_processor, images, self.config, self.device)
        return {**inputs, "pixel_values": inputs["pixel_values"].to(self.dtype)}

    def feature_map(self, pixel_values, interpolate_pos_encoding=False, **shapes):
        """Encode images and fold the patch tokens into the image grid.

        Returns:
            (B, D, H, W); for a tower of native resolution, a tuple of one map (D, H, W) for each image.
        """
        if self.config.image_size is None:
            return tuple(features.permute(2, 0, 1) for features in self(pixel_values, **shapes).last_hidden_state)
        tokens = self(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
        return to_grid(tokens, *self._grid(pixel_values))

    def maps(self, outputs, layer, shapes):
        """Fold features of a tower of native resolution into one map (H, W, D) for each image.

        Args:
            outputs: Outputs of the native class.
            layer: A hidden state's number, `last_hidden_state` or `merged`.
            shapes: The image processor's outputs that describe the images' shapes.
        """
        config, backbone = self.config.backbone_config, backbone_of(self.config.backbone_config)
        grids = LAYOUTS[backbone.layout].grids(shapes, config)
        side = merge_side(config, backbone.merge)
        return to_maps(select_features(outputs, layer), grids, backbone.layout, config, side)

    def _options(self, output_attentions, output_hidden_states):
        """Options of the native class; it keeps its hidden states only where features are taken from one of them."""
        takes_state = self.config.pivot["feature_layer"] not in (LAST, MERGED)
        options = {"output_attentions": True} if output_attentions else {}
        return options | ({"output_hidden_states": True} if output_hidden_states or takes_state else {})

    def _run_native_resolution(self, pixel_values, shapes, output_attentions, output_hidden_states):
        layout = LAYOUTS[backbone_of(self.config.backbone_config).layout]
        if absent := [name for name in layout.inputs if shapes.get(name) is None]:
            raise ValueError(
                f"{absent[0]} is missing: the encoder takes images of their own shapes; pass all that its image "
                "processor returns, or call forward_features."
            )
        options = self._options(output_attentions, output_hidden_states)
        named = {a: shapes[n] for n, a in zip(layout.inputs, layout.arguments, strict=True)}
        outputs = self.backbone(pixel_values, return_dict=True, **named, **options)
        if not hasattr(outputs, "last_hidden_state"):
            raise ValueError(
                f"{type(self.backbone).__name__} of transformers {transformers.__version__} merges all tokens; "
                "install transformers 5.17 or newer."
            )
        return outputs

    def _run_backbone(self, pixel_values, interpolate, output_attentions, output_hidden_states):
        height, width = pixel_values.shape[-2:]
        own, patch = self.config.image_size, self.config.patch_size
        options = self._options(output_attentions, output_hidden_states)
        if (height, width) != (own, own):
            if height % patch or width % patch:
                raise ValueError(
                    f"the patch of {patch} px does not divide images of {height} x {width} px; "
                    f"resize them to multiples of {patch}, or to the encoder's own {own}."
                )
            if backbone_of(self.config.backbone_config).interpolates:
                if not interpolate:
                    raise ValueError(
                        f"images of {height} x {width} px for an encoder of {own}; "
                        "resize them, or set interpolate_pos_encoding=True."
                    )
                options["interpolate_pos_encoding"] = True
        outputs = self.backbone(pixel_values, **options)
        if output_attentions and (not outputs.attentions or outputs.attentions[0] is None):
            raise ValueError(
                f"{self.config._attn_implementation} attention returns no attentions; load the encoder with "
                'attn_implementation="eager".'
            )
        return outputs

    def _patch_tokens(self, hidden):
        """Convert a hidden state (B, prefix + H*W, D), or timm's (B, D, H, W), to patch tokens (B, H*W, D)."""
        if hidden.dim() == 4:
            return hidden.flatten(2).transpose(1, 2)
        return hidden[:, self.config.pivot["prefix_tokens"] :]

    def _grid(self, pixel_values):
        return tuple(side // self.config.patch_size for side in pixel_values.shape[-2:])

    @torch.no_grad()
    def _measure_sizes(self):
        """Measure D and the patch size, which a timm config does not contain, by encoding one blank image."""
        side = self.config.image_size
        blank = torch.zeros(1, 3, side, side, device=self.device, dtype=self.dtype)
        training = self.backbone.training
        states = self.backbone.eval()(blank, output_hidden_states=True).hidden_states
        self.backbone.train(training)
        _, self.config.hidden_size, height, _ = states[self.config.pivot["feature_layer"]].shape
        self.config.patch_size = side // height


def input_names(config):
    """Return the names of the image processor's outputs that an encoder's forward takes.

    Args:
        config: PivotVisionConfig, or a config without a backbone_config, of a model that takes pixel_values only.
    """
    native = getattr(config, "backbone_config", None)
    layout = None if native is None else backbone_of(native).layout
    return ("pixel_values",) if layout is None else ("pixel_values", *LAYOUTS[layout].inputs)


def prepare_images(image_processor, images, config, device):
    """Prepare RGB images with an image processor, for the forward of an encoder with a config, on a device."""
    prepared = image_processor(images=list(images), return_tensors="pt")
    return {name: torch.as_tensor(prepared[name]).to(device) for name in input_names(config)}


def select_features(outputs, layer):
    """Return the features that a layer names, from the outputs of a native class.

    Args:
        outputs: Outputs with all hidden states.
        layer: A hidden state's number, `last_hidden_state`, or `merged` for what a tower's own merger returns.
    """
    if layer == LAST:
        return outputs.last_hidden_state
    if layer == MERGED:
        # Kimi returns the patches of a token beside each other (N, patches, D); Gemma 4 merges in its last step.
        merged = outputs.last_hidden_state if outputs.pooler_output is None else outputs.pooler_output
        return merged.flatten(1)
    return outputs.hidden_states[layer]


class PivotVisionBackbone(PivotVisionModel):
    """Backbone for transformers' segmentation and detection heads, which returns feature maps instead of tokens.

    It follows the AutoBackbone protocol: `AutoBackbone.from_config(PivotVisionConfig(...))`. For trained weights,
    set `head.backbone = PivotVisionBackbone.from_pretrained(repo, out_indices=[3, 6, 9, 12])`.
    """

    def __init__(self, config, backbone=None):
        super().__init__(config, backbone)
        depth = config.num_hidden_layers
        if depth is None:
            raise ValueError("a timm model cannot be a PivotVisionBackbone; use transformers' TimmBackbone.")
        if self.config.image_size is None:
            raise ValueError(
                "a tower of native resolution cannot be a PivotVisionBackbone, whose maps are of one size; use "
                "PivotVisionModel.feature_map."
            )
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(depth))]
        self.num_features = [config.hidden_size] * (depth + 1)
        layer = depth if config.pivot["feature_layer"] == LAST else config.pivot["feature_layer"]
        indices = [layer] if config.out_indices is None else config.out_indices
        self.out_indices = [i % (depth + 1) for i in indices]
        self.out_features = [self.stage_names[i] for i in self.out_indices]
        self.channels = [config.hidden_size] * len(self.out_indices)
        self.out_feature_channels = dict.fromkeys(self.stage_names, config.hidden_size)

    def forward(self, pixel_values, output_hidden_states=None, output_attentions=None, return_dict=None, **kwargs):
        """Encode images of any size that is a multiple of the patch size.

        Returns:
            feature_maps: one map (B, D, H, W) for each of out_indices, without prefix tokens.
        """
        outputs = self._run_backbone(pixel_values, True, output_attentions, True)
        grid = self._grid(pixel_values)
        features = BackboneOutput(
            feature_maps=tuple(to_grid(self._patch_tokens(self._state(outputs, i)), *grid) for i in self.out_indices),
            hidden_states=tuple(outputs.hidden_states) if output_hidden_states else None,
            attentions=outputs.attentions if output_attentions else None,
        )
        return features if return_dict is not False else features.to_tuple()

    def _state(self, outputs, index):
        """Return a hidden state; the last one passes the final norm where the feature layer does."""
        is_last = index == self.config.num_hidden_layers and self.config.pivot["feature_layer"] == LAST
        return outputs.last_hidden_state if is_last else outputs.hidden_states[index]

    def forward_with_filtered_kwargs(self, *args, **kwargs):
        return self(*args, **kwargs)


def native_class(config):
    """Return the class that loads a native config: AutoModel, or the class itself where AutoModel has no entry for it.

    Raises:
        ValueError: This version of transformers has no class for it.
    """
    if type(config) in AutoModel._model_mapping:
        return AutoModel
    module = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    model_class = getattr(module, str(backbone_of(config).model_class), None)
    if model_class is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no model class for {config.model_type}; install a newer "
            "transformers."
        )
    return model_class


def read_image_processor(name, config, **hub_options):
    """Load a repository's image processor in its PIL form.

    PIL gives the same pixels on every machine and is always installed. torchvision resizes differently and may not be
    installed, although some versions of AutoImageProcessor and some classes (DINOv3's) need it.

    Args:
        name: Folder or Hub name.
        config: Native config of the encoder.
        **hub_options: revision, token, cache_dir, local_files_only, subfolder.

    Raises:
        ValueError: The repository has no image processor, or one without a PIL form; the message names the remedy.
    """
    backbone = backbone_of(config)
    needed = backbone.image_processor
    default = _pil_class(needed)
    if default is None and (needed != "Kimi_K25ImageProcessor" or is_torchvision_available()):
        default = getattr(transformers, needed, None)  # the only form in transformers 5.0, of timm's, and of Kimi's
    try:
        values, _ = (default or BaseImageProcessor).get_image_processor_dict(name, **hub_options)
    except OSError as error:
        raise ValueError(
            f"{name}: has no preprocessor_config.json; save a {needed} with the encoder's size, mean and std there."
        ) from error
    class_name = (values.get("image_processor_type") or needed).removesuffix("Fast")
    processor_class = default if class_name in (needed, backbone.replaces) else _pil_class(class_name)
    if processor_class is None:
        raise ValueError(
            f"{name}: its image processor {class_name} has no form without torchvision in transformers "
            f"{transformers.__version__}; load it yourself and set the encoder's image_processor to it."
        )
    processor = processor_class.from_pretrained(name, **hub_options)
    sizes = (getattr(processor, "size", None), getattr(processor, "crop_size", None))  # timm's has neither
    sides = [side for size in sizes for side in dict(size or {}).values()]
    # Those of some towers of native resolution are numbers of pixels.
    most = MOST["image_size"] ** (1 if backbone.layout is None else 2)
    if wrong := [side for side in sides if side is not None and not 1 <= side <= most]:
        raise ValueError(
            f"{name}: images of {wrong[0]} px in preprocessor_config.json are not of 1 to {most} px; restore the file."
        )
    return processor


def _pil_class(name):
    """Return the PIL class of an image processor by its plain name, or None if this transformers has none."""
    if transformers.__version__.startswith("4."):
        return getattr(transformers, name, None)
    return getattr(transformers, f"{name}Pil", None)


def _unpickle(model_class, state):
    """Restore a pickled encoder."""
    model = model_class.__new__(model_class)
    model.__setstate__(state)
    if maybe_install_capturing_hooks is not None:
        maybe_install_capturing_hooks(model.backbone)
    return model


def _add_key_prefix(folder, prefix):
    """Add a prefix to every key of the weights in a folder, and of their index."""
    for file in folder.glob("model*.safetensors"):
        weights = {prefix + k.removeprefix(prefix): v for k, v in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        values = json.loads(index.read_text())
        values["weight_map"] = {prefix + k.removeprefix(prefix): v for k, v in values["weight_map"].items()}
        index.write_text(json.dumps(values, indent=2) + "\n")


def to_grid(tokens, height, width):
    """Fold patch tokens back into their image grid.

    Args:
        tokens: Patch tokens (B, height*width, D), without prefix tokens.
        height: Number of patches from top to bottom.
        width: Number of patches from left to right.

    Returns:
        Feature maps (B, D, height, width).

    Raises:
        ValueError: The number of tokens is not height*width; the message names both.
    """
    if tokens.shape[1] != height * width:
        raise ValueError(f"{tokens.shape[1]} patch tokens do not fill a grid of {height} x {width}.")
    return torch.unflatten(tokens.transpose(1, 2), 2, (height, width))


def _refuse_folder(folder):
    """Raise a ValueError that says why, if a folder does not hold an encoder that loads completely and safely."""
    names = {f.name for f in folder.iterdir()}
    if "adapter_config.json" in names:
        raise ValueError(
            f"{folder}: is a LoRA adapter, not a model; merge it into its base with peft's merge_and_unload() "
            "and save the result."
        )
    if "config.json" not in names:
        raise ValueError(f"{folder}: is not a model repository, it has no config.json; give the folder that holds one.")
    refuse_pickles(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        absent = sorted(set(json.loads(index.read_text())["weight_map"].values()) - names)
        if absent:
            raise ValueError(f"{folder}: {absent[0]} is missing; the download stopped half-way, run it again.")


def refuse_pickles(folder):
    """Raise a ValueError if a folder holds no weights in safetensors; a pickle may run code when it is loaded."""
    names = {f.name for f in folder.iterdir()}
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise ValueError(
            f"{folder}: its weights are a pickle ({pickles[0]}), which may run code; convert them where you trust "
            "them, with AutoModel.from_pretrained(...).save_pretrained(...), which writes safetensors."
        )
    raise ValueError(f"{folder}: has no weights; the download stopped half-way, run it again.")


def refuse_config(values, name):
    """Raise a ValueError that says what a repository is, if its config.json is not an encoder's."""
    model_type = values.get("model_type")
    if any(key in values for key in ("image_token_index", "image_token_id")):
        raise ValueError(
            f"{name}: is an MLLM ({model_type}), not an encoder; take its encoder out with `pivot extract {name} "
            "OUTPUT`."
        )
    own_code = "auto_map" in values and model_type not in CONFIG_MAPPING and model_type != PivotVisionConfig.model_type
    if own_code or (isinstance(model_type, str) and model_type not in CONFIG_MAPPING and model_type != "pivot_vision"):
        code = "; the code that it brings is not run" if own_code else ""
        known = ", ".join(BACKBONES)
        raise ValueError(f"{name}: vision architecture {model_type!r} is not supported{code}; give one of: {known}.")


@torch.no_grad()
def _require_complete(backbone, info, name):
    """Refuse weights that are missing, of another shape or not finite, so that random ones never pass for trained."""
    optional = backbone_of(backbone.config).optional
    missing = sorted(info["missing_keys"])
    for key in [k for k in missing if optional and k.startswith(optional)]:
        weight = backbone.get_parameter(key)
        torch.nn.init.eye_(weight) if weight.dim() == 2 else weight.zero_()
        missing.remove(key)
    wrong = missing or [str(k[0]) for k in info["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} weights are missing or of another shape than config.json says ({wrong[0]} first); "
            "download it again, or give the config that belongs to the weights."
        )
    info["missing_keys"] = type(info["missing_keys"])()
    if unused := unused_keys(backbone, info["unexpected_keys"]):
        raise ValueError(
            f"{name}: {len(unused)} weights of the encoder are not used ({unused[0]} first), because config.json says "
            "fewer layers than the weights have; give the config that belongs to them."
        )
    for key, weight in backbone.named_parameters():
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(
                f"{name}: {key} holds values that are not finite (NaN or infinite); take another checkpoint."
            )


def unused_keys(backbone, unexpected):
    """Return unexpected keys that are like the encoder's own except for a number, such as that of a further layer."""
    prefixes = ("", backbone_of(backbone.config).key_prefix, "vision_model.", f"{backbone.base_model_prefix}.")
    number = re.compile(r"(?<=\.)\d+(?=\.)")
    own = {prefix + number.sub("#", key) for key in backbone.state_dict() for prefix in prefixes}
    return sorted(key for key in unexpected if number.sub("#", key) in own)


def _as_rgb(image):
    """Convert an image, a path, an array or a tensor to an RGB image."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, (str, Path)):
        try:
            Image.init()
            with Image.open(image, formats=[f for f in FORMATS if f in Image.OPEN]) as stored:
                stored.load()
                return to_rgb(stored)
        except ValueError:
            raise
        except Exception as error:  # a damaged file raises whatever its decoder stumbles over
            name = str(image)[:200]
            raise ValueError(f"image {name} cannot be decoded ({str(error)[:200]}); give an image file.") from error
    if not hasattr(image, "__array__") or isinstance(image, (bytes, dict)):
        raise ValueError(f"{type(image).__name__} is not an image; give a PIL image, a path, an array or a tensor.")
    pixels = torch.as_tensor(image if torch.is_tensor(image) else image.copy()).detach().cpu()
    return to_rgb(_array_image(pixels, channels_first=torch.is_tensor(image)))


def _array_image(pixels, channels_first):
    """Convert an array of pixels to a PIL image.

    Args:
        pixels: (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels.
        channels_first: Whether (3, H, 3) has its channels in front.
    """
    shape = tuple(pixels.shape)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.ndim != 3 or not {1, 3, 4} & {shape[0], shape[-1]}:
        raise ValueError(f"an array of shape {shape} is not an image; give (H, W), (H, W, 3) or (3, H, W).")
    elif shape[-1] not in (1, 3, 4) or (channels_first and shape[0] in (1, 3, 4)):
        pixels = pixels.permute(1, 2, 0)
    if pixels.numel() == 0:
        raise ValueError(f"an array of shape {shape} has no pixels.")
    floating = pixels.is_floating_point()
    low, high = pixels.min().item(), pixels.max().item()
    dtype = str(pixels.dtype).removeprefix("torch.")
    if pixels.dtype == torch.bool or pixels.is_complex() or not 0 <= low <= high <= (1 if floating else 255):
        raise ValueError(
            f"an array of {dtype} from {low:.4g} to {high:.4g} is not an image; give integers from 0 to "
            "255 or floats from 0 to 1. Pixels that are already normalised go to the model itself."
        )
    pixels = (pixels.float() * 255).round() if floating else pixels
    array = pixels.to(torch.uint8).contiguous().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def to_rgb(image):
    """Convert an image to RGB: turned upright as its EXIF says, transparency on white, 16-bit grey scaled to 8 bits.

    Raises:
        ValueError: The pixels are floats or 32-bit integers, whose black and white are not defined.
    """
    turn = TURNS.get(_orientation(image))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # at most 16 bits
        image = _to_8_bits(image)
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"an image of mode {image.mode} has 32-bit pixels, whose black and white are not defined; save it with 8 "
            "or 16 bits."
        )
    palette = image.palette.mode if image.mode == "P" and image.palette is not None else ""
    if "A" in palette or "transparency" in image.info or {"A", "a"} & set(image.getbands()):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _orientation(image):
    """Return the orientation in an image's EXIF; 1, which is upright, where there is none that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF leaves the pixels as they are
        return 1


def _to_8_bits(image):
    """Convert 16-bit grey to 8 bits by its high byte, as Pillow converts 16-bit colours."""
    values = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32)
    values = values.reshape(image.height, image.width)
    grey = (values.clamp(0, 65535) >> 8).to(torch.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.numpy())


def _listed(images):
    """Return images as a list; a batch (B, C, H, W) is taken apart, and a single image becomes a list of one."""
    return list(images) if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4 else [images]
