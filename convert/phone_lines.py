# SPDX-License-Identifier: Apache-2.0
"""Lines that answer a question with onnxruntime-genai, in Python, Kotlin and Objective-C.

PROMPT and LOOK stand for a question and one about a picture, as literals of all three languages.

Source: onnxruntime-genai's src/python, src/java and src/objectivec/include/ort_genai_objc.h.
"""

from __future__ import annotations

PYTHON = """\
import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=1024)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode(PROMPT))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
print()
"""
PYTHON_MEDIA = """\
import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime_genai as og

model = og.Model(".")
processor = model.create_multimodal_processor()
stream = processor.create_stream()


def answer(prompt, images=None, audios=None):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=4096)
    generator = og.Generator(model, params)
    generator.set_inputs(processor(prompt, images=images, audios=audios))
    while not generator.is_done():
        generator.generate_next_token()
        print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
    print()


answer(PROMPT)
# answer(LOOK, images=og.Images.open("photo.jpg"))
"""
KOTLIN = """\
import ai.onnxruntime.genai.*
import android.system.Os

Os.setenv("ORT_DISABLE_TELEMETRY", "1", true)
val model = Model(folder)
val tokenizer = Tokenizer(model)
val params = GeneratorParams(model)
params.setSearchOption("max_length", 1024.0)
val generator = Generator(model, params)
generator.appendTokenSequences(tokenizer.encode(PROMPT))
val stream = tokenizer.createStream()
while (!generator.isDone()) {
    generator.generateNextToken()
    print(stream.decode(generator.getLastTokenInSequence(0)))
}
"""
KOTLIN_MEDIA = """\
import ai.onnxruntime.genai.*
import android.system.Os

Os.setenv("ORT_DISABLE_TELEMETRY", "1", true)
val model = Model(folder)
val processor = MultiModalProcessor(model)
val params = GeneratorParams(model)
params.setSearchOption("max_length", 4096.0)
val generator = Generator(model, params)
generator.setInputs(processor.processImages(LOOK, Images(photo)))
// sound: processAudios(prompt, Audios(clip)); both: processImagesAndAudios
// text alone: processImages(prompt, null)
val stream = processor.createStream()
while (!generator.isDone()) {
    generator.generateNextToken()
    print(stream.decode(generator.getLastTokenInSequence(0)))
}
"""
_OBJC_START = """\
#import "ort_genai_objc.h"

setenv("ORT_DISABLE_TELEMETRY", "1", 1);
NSError* error = nil;
OGAModel* model = [[OGAModel alloc] initWithPath:folder error:&error];
"""
_OBJC_PARAMS = """\
OGAGeneratorParams* params = [[OGAGeneratorParams alloc] initWithModel:model error:&error];
[params setSearchOption:@"max_length" doubleValue:LENGTH error:&error];
OGAGenerator* generator = [[OGAGenerator alloc] initWithModel:model params:params error:&error];
"""
_OBJC_LOOP = """\
while (![generator isDoneWithError:&error] && [generator generateNextTokenWithError:&error]) {
    size_t count = [generator sequenceCountAtIndex:0 error:&error];
    int32_t token = [generator sequenceDataAtIndex:0 error:&error][count - 1];
    printf("%s", [[stream decode:token error:&error] UTF8String]);
}
"""
OBJC = (
    _OBJC_START
    + "OGATokenizer* tokenizer = [[OGATokenizer alloc] initWithModel:model error:&error];\n"
    + "OGATokenizerStream* stream = [[OGATokenizerStream alloc] initWithTokenizer:tokenizer error:&error];\n"
    + _OBJC_PARAMS.replace("LENGTH", "1024")
    + "[generator appendTokenSequences:[tokenizer encode:@PROMPT error:&error] error:&error];\n"
    + _OBJC_LOOP
)
OBJC_MEDIA = (
    _OBJC_START
    + """\
OGAMultiModalProcessor* processor = [[OGAMultiModalProcessor alloc] initWithModel:model error:&error];
OGATokenizerStream* stream = [[OGATokenizerStream alloc] initWithMultiModalProcessor:processor error:&error];
OGAImages* images = [[OGAImages alloc] initWithPath:@[photo] error:&error];
OGANamedTensors* inputs = [processor processImages:@LOOK images:images error:&error];
"""
    + _OBJC_PARAMS.replace("LENGTH", "4096")
    + "[generator setInputs:inputs error:&error];\n"
    + _OBJC_LOOP
)
