// node features.mjs FOLDER NAME IMAGE.png FILE OUT.json: features of one image by @huggingface/transformers.
import { writeFileSync } from "node:fs";
import { AutoModel, AutoImageProcessor, RawImage, env } from "@huggingface/transformers";

const [folder, name, picture, dtype, out] = process.argv.slice(2);
env.localModelPath = folder;
env.allowRemoteModels = false;
const processor = await AutoImageProcessor.from_pretrained(name);
const model = await AutoModel.from_pretrained(name, { dtype });
const { pixel_values } = await processor(await RawImage.read(picture));
const made = await model({ pixel_values });
const facts = {
  pixel_values: Array.from(pixel_values.data),
  shape: made.last_hidden_state.dims,
  last_hidden_state: Array.from(made.last_hidden_state.data),
  pooler_output: Array.from(made.pooler_output.data),
};
writeFileSync(out, JSON.stringify(facts));
