// node features.mjs FOLDER NAME IMAGE.png DTYPE OUT.json: write features of one image by @huggingface/transformers.
import { writeFileSync } from "node:fs";
import { AutoModel, AutoImageProcessor, RawImage, env } from "@huggingface/transformers";

const [folder, name, image, dtype, out] = process.argv.slice(2);
env.localModelPath = folder;
env.allowRemoteModels = false;
const processor = await AutoImageProcessor.from_pretrained(name);
const model = await AutoModel.from_pretrained(name, { dtype });
const { pixel_values } = await processor(await RawImage.read(image));
const { last_hidden_state, pooler_output } = await model({ pixel_values });
const features = {
  pixel_values: Array.from(pixel_values.data),
  shape: last_hidden_state.dims,
  last_hidden_state: Array.from(last_hidden_state.data),
  pooler_output: Array.from(pooler_output.data),
};
writeFileSync(out, JSON.stringify(features));
